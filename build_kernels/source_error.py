"""Where in the project's own sources a Python exception comes from.

A kernel's Python is called by a compiler's many frames, and a contract or a row of the catalog by
the builder's. What helps is the line of the source that is wrong.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent

#: The folders, inside the builder, whose files a kernel developer writes.
_WRITTEN = ("kernels", "catalog")


@dataclass(frozen=True, slots=True)
class SourceError:
    """An exception as a user reads it.

    Attributes:
        text: ``path:line: type: message`` and the source line, or the whole traceback if none of
            its lines is in a kernel or in the catalog.
        trace: The other lines of kernels and the catalog on the way there, the nearest first.

    """

    text: str
    trace: str


def located(error: BaseException) -> SourceError | None:
    """Return where an exception comes from; None if no line of a kernel or of the catalog is
    involved.

    Of exceptions that caused each other, the first one counts that has such a line.
    """
    for each in reversed(list(_chain(error))):
        if (
            isinstance(each, SyntaxError)
            and each.filename
            and (path := _ours(each.filename)) is not None
        ):
            source = (each.text or "").strip()
            return SourceError(
                f"{path}:{each.lineno}: {type(each).__name__}: {each.msg}"
                + (f"\n    {source}" if source else ""),
                "",
            )
        frames = [
            (path, frame)
            for frame in traceback.extract_tb(each.__traceback__)
            if (path := _ours(frame.filename)) is not None
        ]
        if frames:
            *callers, (path, last) = frames
            message = " ".join(traceback.format_exception_only(each)[-1].split())
            text = f"{path}:{last.lineno}: {message}" + (f"\n    {last.line}" if last.line else "")
            trace = [f"  from {path}:{f.lineno}, in {f.name}" for path, f in reversed(callers)]
            return SourceError(text, "\n".join(trace))
    return None


def explained(error: BaseException) -> SourceError:
    """Return where an exception comes from, or its whole traceback if that is unknown."""
    return located(error) or SourceError(
        "the compiler failed:\n" + "".join(traceback.format_exception(error)).strip(), ""
    )


def from_root(path: Path) -> str:
    """Return a path as it is from the project's root; unchanged if it is elsewhere."""
    return str(path.relative_to(PACKAGE.parent) if path.is_relative_to(PACKAGE.parent) else path)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _ours(file: str) -> str | None:
    """The path of a kernel's or the catalog's file from the project's root; None for another."""
    path = Path(file)
    if any(path.is_relative_to(PACKAGE / folder) for folder in _WRITTEN):
        return from_root(path)
    return None
