"""Digests of sources as a compiler or an interpreter sees them.

Two sources have the same digest if they differ only in comments, docstrings, layout and the names
of our own files; any other difference gives another digest. An import of one of our modules and an
``#include`` of one of our headers is replaced by the digest of what it names, so a digest covers
exactly the files that are reached, and renaming a file (its importers adjusted) leaves it as it
was. Modules and headers of others keep their names. The digest of a text does not depend on the
version of Python that computes it.

What a digest does not see: modules that are imported by a computed name, the ``__init__.py`` of a
package from which nothing is imported by name, ``__name__`` and ``__LINE__``.
"""

from __future__ import annotations

import ast
import hashlib
import re
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

#: The folder of the package ``router_runtime``.
RUNTIME = Path(__file__).parents[1]


def own_digest(path: Path) -> str:
    """Return the SHA-256 of what a compiler or an interpreter sees of one file. What it imports or
    includes counts by its name. A file that is neither Python nor CUDA C++ counts by its bytes, and
    so does one that cannot be read as that. Raises OSError for a file that cannot be read at all.
    """
    data = path.read_bytes()
    try:
        if path.suffix == ".py":
            writer = _Writer({}, lambda source, name: None)
            writer.write(ast.parse(data).body)
            return _sha256(writer.parts)
        if path.suffix in (".cu", ".cuh"):
            return _sha256(_cuda_lines(data.decode("utf-8")))
    except (SyntaxError, ValueError):
        pass
    return hashlib.sha256(data).hexdigest()


class PythonSources:
    """Digests of modules in the packages of a source tree; each module is read once.

    Args:
        packages: the name of a top-level package -> its folder.
        boundaries: packages or modules (dotted names) inside ``packages`` that are not followed.
            What is imported from one counts by its own name and the boundary's, so names may move
            between the modules behind a boundary.

    """

    def __init__(self, packages: Mapping[str, Path], boundaries: Collection[str] = ()) -> None:
        self._packages = dict(packages)
        self._boundaries = tuple(boundaries)
        self._digests: dict[str, str] = {}
        self._reached: dict[str, frozenset[str]] = {}
        # Module -> the names that its digest leaves out because they are imported modules of ours.
        self._unnamed: dict[str, frozenset[str]] = {}
        self._active: list[str] = []

    def digest(self, module: str) -> str:
        """SHA-256 of a module (dotted name) and of every module of ours that it reaches.

        Raises ValueError for a module that does not exist, a syntax error, an import cycle, and the
        use of a module by the name under which another module of ours imports it.
        """
        if module not in self._digests:
            if module in self._active:
                cycle = " -> ".join([*self._active[self._active.index(module) :], module])
                raise ValueError(f"expected imports without a cycle, found {cycle}")
            self._active.append(module)
            try:
                self._read(module)
            finally:
                self._active.pop()
        return self._digests[module]

    def reached(self, module: str) -> Mapping[str, Path]:
        """The file of ``module`` and of every module that its digest covers, by dotted name."""
        self.digest(module)
        return {name: self._existing(name) for name in sorted(self._reached[module])}

    def _read(self, module: str) -> None:
        path = self._existing(module)
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError as error:
            raise ValueError(
                f"{path}:{error.lineno}: expected Python, found {error.msg}"
            ) from error
        reached = {module}

        def resolve(source: str, name: str | None) -> _Origin | None:
            """What ``import source`` (name None) or ``from source import name`` refers to."""
            if source.split(".")[0] not in self._packages:
                return None
            whole = source if name is None else f"{source}.{name}"
            is_module = name is None or self._file(whole) is not None
            target = whole if is_module else source
            for boundary in self._boundaries:
                if f"{target}.".startswith(f"{boundary}."):
                    return boundary, is_module
            digest = self.digest(target)
            reached.update(self._reached[target])
            unnamed = self._unnamed[digest]
            if not is_module and (name in unnamed or (name == "*" and unnamed)):
                raise _through(path, f"from {source} import {name}")
            return digest, is_module

        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        tree = _AbsoluteImports(package).visit(tree)
        modules = _module_names(tree, resolve)
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.attr in self._unnamed.get(modules.get(node.value.id, ""), ())
            ):
                raise _through(path, f"{node.value.id}.{node.attr}")
        writer = _Writer(modules, resolve)
        writer.write(tree.body)
        digest = self._digests[module] = _sha256(writer.parts)
        self._unnamed[digest] = self._unnamed.get(digest, frozenset()) | modules.keys()
        self._reached[module] = frozenset(reached)

    def _existing(self, module: str) -> Path:
        path = self._file(module)
        if path is None:
            raise ValueError(f"expected a module {module} in {sorted(self._packages)}, found none")
        return path

    def _file(self, module: str) -> Path | None:
        top, *rest = module.split(".")
        place = self._packages[top].joinpath(*rest)
        files = (place / "__init__.py", place.with_name(f"{place.name}.py"))
        return next((path for path in files if path.is_file()), None)


def _through(path: Path, found: str) -> ValueError:
    """The error for a module that is used by its name in another one, which no digest has."""
    return ValueError(
        f"{path}: expected modules imported from where they are, found {found!r}; "
        "next: import the module itself"
    )


class CudaSources:
    """Digests of CUDA C++ sources that include ``headers``: what an ``#include "..."`` or
    ``#include <...>`` says -> the header's text. Other includes count by their names.
    """

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = dict(headers)
        self._digests: dict[str, str] = {}
        self._reached: dict[str, frozenset[str]] = {}
        self._active: list[str] = []

    def digest(self, text: str) -> str:
        """SHA-256 of a source and of every header of ours that it includes.

        Raises ValueError for headers that include each other, for a macro that turns its argument
        into a string (the white space of the argument would count), for an include whose name is a
        macro, ``__has_include``, and for the digraph ``%:``.
        """
        return self._read(text)[0]

    def reached(self, text: str) -> frozenset[str]:
        """The headers that the digest of ``text`` covers, as an ``#include`` says them."""
        return self._read(text)[1]

    def _read(self, text: str) -> tuple[str, frozenset[str]]:
        reached: set[str] = set()
        lines = []
        for line in _cuda_lines(text):
            name = _included(line)
            if name in self._headers:
                line = f"#include {self._header(name)}"
                reached |= {name} | self._reached[name]
            elif line.startswith("#define") and _STRINGIZING.search(_QUOTED.sub("", line)):
                raise ValueError(
                    f"expected macros without the operator # (it makes white space count), found "
                    f"{line!r}; next: write the string out"
                )
            lines.append(line)
        return _sha256(lines), frozenset(reached)

    def _header(self, name: str) -> str:
        if name not in self._digests:
            if name in self._active:
                cycle = " -> ".join([*self._active[self._active.index(name) :], name])
                raise ValueError(f"expected includes without a cycle, found {cycle}")
            self._active.append(name)
            try:
                self._digests[name], self._reached[name] = self._read(self._headers[name])
            finally:
                self._active.pop()
        return self._digests[name]


# --- Python: a syntax tree as text ---------------------------------------------------------------

#: A digest or a boundary's name, and whether a whole module is meant or a name inside one.
_Origin = tuple[str, bool]


class _Resolve(typing.Protocol):
    def __call__(self, source: str, name: str | None) -> _Origin | None: ...


#: Fields that other fields decide, or that the interpreter does not read.
_UNREAD = frozenset({"ctx", "kind", "type_comment", "type_ignores"})
#: Fields with a name that is not a variable of the module.
_NO_VARIABLE = frozenset({("Attribute", "attr"), ("keyword", "arg"), ("MatchClass", "kwd_attrs")})


class _Writer:
    """Writes a syntax tree as parts of a text.

    ``modules``: variables that stand for a module of ours -> what to write for that module.
    """

    def __init__(self, modules: Mapping[str, str], resolve: _Resolve) -> None:
        self._modules = modules
        self._resolve = resolve
        self.parts: list[str] = []

    def write(self, value: object) -> None:
        write = self.parts.append
        if isinstance(value, list):
            write("[")
            self._items(value)
            write("]")
        elif isinstance(value, ast.Constant):
            write(f"{type(value.value).__name__} {value.value!a} ")
        elif isinstance(value, ast.Name):
            module = self._modules.get(value.id)
            write(f"Name {value.id} " if module is None else f"module {module} ")
        elif isinstance(value, ast.AST):
            write(f"{type(value).__name__}(")
            for name, item in ast.iter_fields(value):
                # Absent is left out: a newer Python has more fields, all of them optional.
                if name not in _UNREAD and item is not None and item != []:
                    write(f"{name}=")
                    self.write(_merged(item) if isinstance(value, ast.JoinedStr) else item)
            write(")")
        else:
            write(f"{value!a} ")

    def _items(self, items: Sequence[object]) -> None:
        imports: list[ast.Import | ast.ImportFrom] = []
        for item in items:
            if isinstance(item, ast.Import | ast.ImportFrom):
                imports.append(item)
            elif not _without_effect(item):
                self._imports(imports)
                imports = []
                self.write(item)
        self._imports(imports)

    def _imports(self, run: Sequence[ast.Import | ast.ImportFrom]) -> None:
        """Consecutive imports: those of others in their order, then ours sorted by what they
        import, because a formatter sorts them by the names of files. If two of them bind one name,
        all stay in their order, for the last one counts.
        """
        ours: list[str] = []
        names = [alias.asname or alias.name for statement in run for alias in statement.names]
        ordered = len(set(names)) < len(names) or "*" in names
        for statement in run:
            source = statement.module if isinstance(statement, ast.ImportFrom) else None
            for alias in statement.names:
                if source is None:
                    bound = alias.asname or alias.name
                    origin = self._resolve(alias.name, None)
                else:
                    bound = alias.asname or alias.name
                    origin = self._resolve(source, alias.name)
                if origin is None:
                    written = f"import {source} {alias.name} {alias.asname} "
                else:
                    digest, is_module = origin
                    name = "" if is_module else f"{alias.name} "
                    shown = "" if bound in self._modules else f"as {bound} "
                    written = f"import {digest} {name}{shown}"
                (self.parts if origin is None or ordered else ours).append(written)
        self.parts += sorted(ours)


def _module_names(tree: ast.Module, resolve: _Resolve) -> Mapping[str, str]:
    """The variables of a module that stand for a module of ours wherever they occur in it, and the
    digest of that module: bound by one import at the top level and by nothing else.
    """
    found: dict[str, str] = {}
    bound: list[str] = []
    for node in ast.walk(tree):
        kind = type(node).__name__
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound += [alias.asname or alias.name.split(".")[0] for alias in node.names]
        elif not isinstance(node, ast.alias | ast.Constant) and not (
            isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        ):
            for name, value in ast.iter_fields(node):
                if (kind, name) not in _NO_VARIABLE:
                    values = value if isinstance(value, list) else [value]
                    bound += [each for each in values if isinstance(each, str)]
    for statement in tree.body:
        if not isinstance(statement, ast.Import | ast.ImportFrom):
            continue
        for alias in statement.names:
            variable = alias.asname or alias.name
            if isinstance(statement, ast.ImportFrom):
                origin = resolve(statement.module or "", alias.name)
            else:
                origin = resolve(alias.name, None) if alias.asname else None
            if origin is not None and origin[1] and bound.count(variable) == 1:
                found[variable] = origin[0]
    return found


class _AbsoluteImports(ast.NodeTransformer):
    """Names the source of a relative import in full."""

    def __init__(self, package: str) -> None:
        self._package = package

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        if node.level:
            parts = self._package.split(".")
            base = parts[: len(parts) - node.level + 1]
            node.module = ".".join([*base, *([node.module] if node.module else [])])
            node.level = 0
        return node


def _without_effect(item: object) -> bool:
    """True for ``pass`` and for a string that is a statement, a docstring among them."""
    return isinstance(item, ast.Pass) or (
        isinstance(item, ast.Expr)
        and isinstance(item.value, ast.Constant)
        and isinstance(item.value.value, str)
    )


def _merged(values: Iterable[ast.expr]) -> list[ast.expr]:
    """The parts of an f-string with neighbouring texts joined: versions of Python split them
    differently.
    """
    merged: list[ast.expr] = []
    for value in values:
        last = merged[-1] if merged else None
        if isinstance(value, ast.Constant) and isinstance(last, ast.Constant):
            merged[-1] = ast.Constant(str(last.value) + str(value.value))
        elif not (isinstance(value, ast.Constant) and value.value == ""):
            merged.append(value)
    return merged


# --- CUDA C++: tokens as text --------------------------------------------------------------------

_RAW_STRING = r'(?:u8|[uUL])?R"(?P<{0}>[^()\\\s]{{0,16}})\((?s:.*?)\)(?P={0})"'
#: What a backslash before a new line can be in. It is removed everywhere but in a raw string.
_CONTINUED = re.compile(
    rf"(?P<raw>{_RAW_STRING.format('ends')})"
    r"""|"(?:[^"\\\n]|\\(?s:.))*"|'(?:[^'\\\n]|\\(?s:.))+'"""
    r"|[0-9](?:'?[A-Za-z0-9_])*|[A-Za-z0-9_]+"
    r"|//(?:\\\n|[^\n])*|/\*(?s:.*?)\*/|\\\n"
)
_TOKEN = re.compile(
    rf"(?P<raw>{_RAW_STRING.format('delimiter')})"
    r"""|(?P<quoted>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)+')"""
    r"|(?P<number>\.?[0-9](?:[eEpP][+-]|'?[A-Za-z0-9_]|\.)*)"
    r"|(?P<space>[^\S\n]+|//[^\n]*|/\*(?s:.*?)\*/)"
    r"|(?P<end>\n)"
    r"|(?P<word>[A-Za-z0-9_]+)"
    r"|(?P<digraph>%:)"
    r"|(?P<other>.)"
)
_WORD = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_")
#: Characters that are always a token of their own.
_ALONE = frozenset("()[]{},;\n")
#: Characters that can be one token with a word beside them.
_JOINING = frozenset("\"'.#\\")
_INCLUDE = re.compile(r'#include(?:"([^"]*)"|<([^>]*)>)')
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_STRINGIZING = re.compile(r"(?<=.)(?<!#)#(?!#)")


def _cuda_lines(text: str) -> Iterator[str]:
    """The tokens of a source with white space only where it separates two of them: a line for each
    preprocessor directive, and one for what lies between two directives.
    """
    text = _CONTINUED.sub(
        lambda found: found["raw"] or found[0].replace("\\\n", ""), text.replace("\r\n", "\n")
    )
    line = ""
    gap = directive = False
    fresh = True
    for match in _TOKEN.finditer(text):
        token = match[0]
        if match.lastgroup == "space":
            gap = True
        elif match.lastgroup == "end":
            if directive:
                yield line + "\n"
                line = ""
            gap, directive, fresh = True, False, True
        elif match.lastgroup == "digraph":
            raise ValueError("expected directives with #, found the digraph %:; next: write #")
        else:
            if fresh and token == "#":
                if line:
                    yield line
                line, directive = "", True
            # A macro without parameters may begin with a parenthesis: #define NAME (1)
            kept = directive and token == "("
            if gap and line not in ("", "#") and (kept or _separates(line[-1], token[0])):
                line += " "
            line += token
            gap = fresh = False
    if line:
        yield line + ("\n" if directive else "")


def _separates(left: str, right: str) -> bool:
    """True if white space between these two characters can make a difference."""
    if left in _ALONE or right in _ALONE:
        return False
    if (left in _WORD) != (right in _WORD):
        return left in _JOINING or right in _JOINING
    return True


def _included(line: str) -> str:
    """What a directive includes, or "" for another line."""
    directive = line.replace(" ", "")
    match = _INCLUDE.match(directive)
    if match:
        return match[1] or match[2]
    if directive.startswith("#include") or "__has_include" in directive:
        raise ValueError(
            f"expected an include that names its header, found {line!r}; next: write the name out"
        )
    return ""


def _sha256(parts: Iterable[str]) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()
