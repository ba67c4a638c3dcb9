"""Digests of sources: what leaves them as they are, and what changes them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_runtime.format.source_digest import CudaSources, PythonSources

pytestmark = pytest.mark.one_torch

Digest = Callable[[Mapping[str, str]], str]


@pytest.fixture
def digest(tmp_path: Path) -> Digest:
    """The digest of ``ours.main`` among modules given as file name -> text."""
    trees = iter(range(100))

    def digest(files: Mapping[str, str]) -> str:
        folder = tmp_path / str(next(trees))
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        packages = {"ours": folder, "runtime": folder / "runtime"}
        return PythonSources(packages, boundaries=("runtime.format",)).digest("ours.main")

    return digest


MAIN = '''
"""A kernel."""

import math
from collections.abc import Mapping

from ours import tools
from ours.parts.epilogue import finish
from runtime.format.contract import Contract

#: The number of lanes.
LANES = 32


class Kernel:
    """What it does."""

    def run(self, rows: int) -> int:
        """Run it."""
        width = rows * LANES + tools.width(1)
        return finish(width, f"{rows:>4} rows", scale=1.5)


def declared() -> Contract:
    return Contract(tools.NAMES)
'''
FILES = {
    "main.py": MAIN,
    "tools.py": 'NAMES = ("a", "b")\n\n\ndef width(n: int) -> int:\n    return n << 2\n',
    "parts/epilogue.py": "def finish(a, b, scale):\n    return a * scale\n",
    "unused.py": "SIDE = 1\n",
    "runtime/format/contract.py": "class Contract: ...\n",
    "runtime/format/other.py": "class Contract: ...\n",
}


def replaced(name: str, old: str, new: str) -> dict[str, str]:
    assert old in FILES[name], old
    return {**FILES, name: FILES[name].replace(old, new)}


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("main.py", '"""A kernel."""', ""),
        ("main.py", '"""A kernel."""', '"""Another text,\n\non more lines."""'),
        ("main.py", '        """Run it."""\n', ""),
        ("main.py", "#: The number of lanes.", "# Lanes of a warp."),
        ("main.py", "rows * LANES", "(rows  *  LANES)"),
        ("main.py", "        return finish(", "\n        # Last.\n        return finish(  # now\n"),
        ("main.py", '"""What it does."""', '"""What it does."""\n\n    pass'),
        ("tools.py", "def width", '# Why.\n"""A text."""\n\n\ndef width'),
        ("parts/epilogue.py", "    return", '    """Multiply."""\n    return'),
        ("unused.py", "1", "2"),
        ("runtime/format/contract.py", "...", "x = 1"),
        ("main.py", "runtime.format.contract", "runtime.format.other"),
    ],
)
def test_what_python_does_not_see(digest: Digest, name: str, old: str, new: str) -> None:
    assert digest(replaced(name, old, new)) == digest(FILES)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("main.py", "LANES = 32", "LANES = 31"),
        ("main.py", "LANES = 32", "LANES = 32.0"),
        ("main.py", "LANES = 32", 'LANES = "32"'),
        ("main.py", "rows * LANES", "rows + LANES"),
        ("main.py", "rows * LANES +", "rows * (LANES +"),
        ("main.py", ":>4", ":>5"),
        ("main.py", " rows", " columns"),
        ("main.py", "scale=1.5", "scale=2.5"),
        ("main.py", "scale=1.5", "scales=1.5"),
        ("main.py", "rows: int", "rows: float"),
        ("main.py", "class Kernel", "class Colonel"),
        ("main.py", "import math", "import cmath"),
        ("main.py", "Contract(tools.NAMES)", "Contract(tools.names)"),
        ("main.py", "import Contract", "import Contract as Other"),
        ("tools.py", "<<", ">>"),
        ("tools.py", "2", "3"),
        ("tools.py", '("a", "b")', '("ab",)'),
        ("parts/epilogue.py", "a * scale", "b * scale"),
    ],
)
def test_what_python_sees(digest: Digest, name: str, old: str, new: str) -> None:
    changed = replaced(name, old, new)
    if "(LANES +" in new:
        changed["main.py"] = changed["main.py"].replace("width(1)", "width(1))")
    assert digest(changed) != digest(FILES)


def renamed(old: str, new: str, main: Callable[[str], str]) -> dict[str, str]:
    files = {name: text for name, text in FILES.items() if name != old}
    return {**files, new: FILES[old], "main.py": main(FILES["main.py"])}


def test_the_name_of_a_module_does_not_count(digest: Digest) -> None:
    """Nor its folder, nor where a formatter puts its import among the others."""
    moved = renamed("tools.py", "zoo/other.py", lambda text: text)
    for text in (
        MAIN.replace("from ours import tools", "from ours.zoo import other"),
        MAIN.replace("from ours import tools\n", "").replace(
            "from runtime", "from ours.zoo import other\nfrom runtime"
        ),
        MAIN.replace("from ours import tools", "import ours.zoo.other as other"),
        MAIN.replace("from ours import tools", "from .zoo import other"),
    ):
        moved["main.py"] = text.replace("tools.", "other.")
        assert digest(moved) == digest(FILES)
    epilogue = renamed(
        "parts/epilogue.py", "last.py", lambda text: text.replace("parts.epilogue", "last")
    )
    assert digest(epilogue) == digest(FILES)


def test_a_name_from_another_module_counts(digest: Digest) -> None:
    files = {**FILES, "copy.py": FILES["tools.py"].replace("2", "3")}
    files["main.py"] = MAIN.replace("import tools", "import copy as tools")
    assert digest(files) != digest(FILES)
    again = {**FILES, "other.py": FILES["parts/epilogue.py"] + "EXTRA = 1\n"}
    again["main.py"] = MAIN.replace("parts.epilogue", "other")
    assert digest(again) != digest(FILES)


def test_a_parameter_with_the_name_of_a_module_is_not_that_module(digest: Digest) -> None:
    """Two programs that differ in what one name refers to differ in their digests."""
    tail = "\n\ndef f(tools):\n    return tools.width(1)\n"
    shadowed = {**FILES, "main.py": MAIN + tail}
    used = {**FILES, "main.py": MAIN + tail}
    used["main.py"] = (
        used["main.py"]
        .replace("import tools", "import tools as kit")
        .replace("tools.width(1)\n        return finish", "kit.width(1)\n        return finish")
        .replace("tools.NAMES", "kit.NAMES")
        .replace("return tools.width", "return kit.width")
    )
    assert digest(shadowed) != digest(used)


def test_what_a_dotted_import_refers_to_counts(digest: Digest) -> None:
    files = {
        "main.py": "import ours.a\nimport ours.b\n\nSIDE = ours.a.SIDE\n",
        "a.py": "SIDE = 1\n",
        "b.py": "SIDE = 2\n",
    }
    exchanged = {**files, "a.py": files["b.py"], "b.py": files["a.py"]}
    assert digest(files) != digest(exchanged)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("from ours.a import SIDE", "from ours.b import SIDE"),
        ("from ours.a import pi", "from math import pi"),
        ("from ours.a import *", "from ours.b import *"),
    ],
)
def test_the_order_of_imports_that_bind_one_name_counts(
    digest: Digest, first: str, second: str
) -> None:
    files = {"a.py": "SIDE = 1\npi = 3\n", "b.py": "SIDE = 2\n"}
    one = digest({**files, "main.py": f"{first}\n{second}\n"})
    assert one != digest({**files, "main.py": f"{second}\n{first}\n"})


@pytest.mark.parametrize(
    "main",
    [
        "from ours.between import kit\n",
        "from ours.between import *\n",
        "from ours import between\n\nNAMES = between.kit.NAMES\n",
    ],
)
def test_a_module_used_by_its_name_in_another_is_refused(digest: Digest, main: str) -> None:
    """That name is in no digest, so that it could come to mean another module unnoticed."""
    files = {**FILES, "between.py": "from ours import tools as kit\n", "main.py": main}
    with pytest.raises(ValueError, match="expected modules imported from where they are"):
        digest(files)


def test_imports_inside_functions_count(digest: Digest) -> None:
    late = {**FILES, "main.py": MAIN + "\n\ndef f():\n    from ours import unused\n"}
    changed = {**late, "unused.py": "SIDE = 2\n"}
    assert digest(late) != digest(changed)


def test_an_import_cycle_is_refused(digest: Digest) -> None:
    files = {**FILES, "tools.py": "from ours import main\n"}
    with pytest.raises(ValueError, match=r"a cycle, found ours\.main -> ours\.tools -> ours\.main"):
        digest(files)


def test_a_module_that_does_not_exist_is_refused(digest: Digest) -> None:
    with pytest.raises(ValueError, match=r"expected a module ours\.nowhere"):
        digest({**FILES, "tools.py": "from ours.nowhere import x\n"})
    with pytest.raises(ValueError, match=r"tools\.py:1: expected Python"):
        digest({**FILES, "tools.py": "x ="})


def test_what_a_digest_reached(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    sources = PythonSources({"ours": tmp_path, "runtime": tmp_path / "runtime"}, ("runtime",))
    assert sources.reached("ours.main") == {
        "ours.main": tmp_path / "main.py",
        "ours.parts.epilogue": tmp_path / "parts" / "epilogue.py",
        "ours.tools": tmp_path / "tools.py",
    }


# --- CUDA ----------------------------------------------------------------------------------------

KERNEL = r"""
#include <cuda_bf16.h>
#include "common/factor.cuh"
#define TWICE(x) \
    ((x) + (x))
#define ONE (1)
#if WIDTH > 1
constexpr float STEP = 1'000.5e-3f;
#endif
extern "C" __global__ void scale(const float* x, float* y, int n)
{
    const char* text = "a // b /* c */ \" d";
    char quote = '"';
    const char* raw = R"x( // )" kept )x";
    asm("mov.u32 %0, %laneid;" : "=r"(n));
    if (n - -1 > 0) y[n] = x[n] * factor() + TWICE(ONE);
}
"""
HEADERS = {"common/factor.cuh": "__device__ float factor() { return FACTOR; }\n"}


def cuda(text: str, headers: Mapping[str, str] = HEADERS) -> str:
    return CudaSources(headers).digest(text)


def exchanged(old: str, new: str) -> str:
    assert old in KERNEL, old
    return KERNEL.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("\nextern", "\n// What it does. \\\n   And why.\nextern"),
        ("\nextern", "\n/* What\nit does. */ extern"),
        ("factor()", "factor(/* none */)"),
        ("* factor", "* // by the factor\n        factor"),
        ("    if (n", "\n\n\tif(n"),
        ("y[n] = x[n]", "y[ n ]=x[n]"),
        ("#if WIDTH > 1", "#if WIDTH > 1  // wide"),
        ("#define ONE (1)", "#  define  ONE  (1) /* one */"),
        ("#define TWICE(x) \\\n    ((x) + (x))", "#define TWICE(x) ((x) + (x))"),
        ("\n", "\r\n"),
        ("extern", "ext\\\nern"),
    ],
)
def test_what_cuda_does_not_see(old: str, new: str) -> None:
    assert cuda(exchanged(old, new)) == cuda(KERNEL)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("n - -1", "n --1"),
        ("n - -1", "n - 1"),
        ("> 0", ">= 0"),
        ("a // b", "a //b"),
        ("/* c */", ""),
        ('\\" d', '\\"  d'),
        (" // )", " //)"),
        ("kept", "lost"),
        ("'\"'", "'\\''"),
        ("1'000.5e-3f", "1'000.5e+3f"),
        ("1'000.5e-3f", "1'001.5e-3f"),
        ("%0, %laneid", "%0,%laneid"),
        ("#define ONE (1)", "#define ONE(1)"),
        ("#endif\n", ""),
        ("#if WIDTH > 1\n", "#if WIDTH > 2\n"),
        ("cuda_bf16.h", "cuda_fp16.h"),
        ("const float* x", "float* x"),
        ("int n", "intn"),
    ],
)
def test_what_cuda_sees(old: str, new: str) -> None:
    assert cuda(exchanged(old, new)) != cuda(KERNEL)


def test_the_name_of_a_header_does_not_count() -> None:
    moved = {"common/multiplier.cuh": HEADERS["common/factor.cuh"]}
    assert cuda(exchanged("common/factor", "common/multiplier"), moved) == cuda(KERNEL)
    changed = {"common/factor.cuh": HEADERS["common/factor.cuh"].replace("FACTOR", "2 * FACTOR")}
    assert cuda(KERNEL, changed) != cuda(KERNEL)
    commented = {"common/factor.cuh": "// Why.\n" + HEADERS["common/factor.cuh"]}
    assert cuda(KERNEL, commented) == cuda(KERNEL)


def test_headers_that_headers_include() -> None:
    text = '#include "a.cuh"\n'
    headers = {"a.cuh": '#include "b.cuh"\n', "b.cuh": "int b;\n", "c.cuh": "int c;\n"}
    assert CudaSources(headers).reached(text) == {"a.cuh", "b.cuh"}
    assert cuda(text, headers) != cuda(text, {**headers, "b.cuh": "int bb;\n"})
    assert cuda(text, headers) == cuda(text, {**headers, "c.cuh": "int cc;\n"})
    with pytest.raises(ValueError, match=r"without a cycle, found a\.cuh -> b\.cuh -> a\.cuh"):
        cuda(text, {**headers, "b.cuh": '#include "a.cuh"\n'})


def test_a_macro_that_makes_white_space_count_is_refused() -> None:
    assert cuda("#define PASTE(a, b) a##b\n")
    assert cuda('#define WORD "#"\n')
    with pytest.raises(ValueError, match="expected macros without the operator #"):
        cuda("#define TEXT(x) #x\n")


def test_a_header_in_angle_brackets_counts() -> None:
    text = KERNEL.replace('"common/factor.cuh"', "<common/factor.cuh>")
    changed = {name: header.replace("FACTOR", "2.0f") for name, header in HEADERS.items()}
    assert cuda(text) != cuda(text, changed)
    assert CudaSources(HEADERS).reached(text) == set(HEADERS)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('#define NAME "a.cuh"\n#include NAME\n', "an include that names its header"),
        ('#if __has_include("a.cuh")\n#endif\n', "an include that names its header"),
        ("%:define WIDTH 1\n", "found the digraph %:"),
    ],
)
def test_what_would_hide_a_header_or_a_directive_is_refused(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        cuda(text)


@pytest.mark.parametrize("opening", ['// R"(', '/* R"( */', 'FOOR"("', "'R\"('"])
def test_what_only_looks_like_a_raw_string_continues_lines(opening: str) -> None:
    """The backslash makes the next line a part of the comment."""
    text = f'{opening}\n// a \\\nint b;\n// )"\n'
    assert cuda(text) == cuda(text.replace("int b;", "int c;"))
    assert cuda(text) != cuda(text.replace("\\", ""))


TOKENS = st.sampled_from(
    ["a", "b1", "0x1p3", "1.5f", ".5", "+", "-", ">", "<", "(", ")", ",", ";", '"s t"', "'c'", "::"]
)
GAPS = st.sampled_from([" ", "\n", "\t  ", " /* a */ ", " // b\n", "/**/", "\\\n \\\n"])


@given(st.lists(TOKENS, min_size=1), st.data())
def test_any_white_space_between_tokens_is_the_same(tokens: list[str], data: st.DataObject) -> None:
    gaps = data.draw(st.lists(GAPS, min_size=len(tokens), max_size=len(tokens)))
    spread = "".join(token + gap for token, gap in zip(tokens, gaps, strict=True))
    assert cuda(spread) == cuda(" ".join(tokens))
