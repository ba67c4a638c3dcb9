"""What NVRTC prints, as one text for each error, with paths from the project's root."""

from __future__ import annotations

import re
from pathlib import Path

from build_kernels.compile.sources import KERNELS
from build_kernels.source_error import from_root

#: The first line of an error: a file as an ``#include`` says it, a line, and what is wrong.
_START = re.compile(
    r"^(?P<file>[^\s(][^(\n]*)\((?P<line>\d+)\): (?=[a-z -]*(?:error|warning))", re.M
)
#: The line after the last one.
_SUM = re.compile(r"^\d+ (?:catastrophic )?errors? detected in the compilation of .*", re.M | re.S)


def diagnostics(kernel: str, text: str) -> list[str]:
    """Return the errors in the text of a failed compilation, each once and in their order; the
    whole text if it has none of NVRTC's form.
    """
    text = _SUM.sub("", text)
    starts = [match.start() for match in _START.finditer(text)]
    if not starts:
        return [text]
    parts = [text[low:high].strip() for low, high in zip(starts, [*starts[1:], None], strict=True)]
    return list(dict.fromkeys(_START.sub(lambda m: _place(kernel, m), part) for part in parts))


def _place(kernel: str, match: re.Match[str]) -> str:
    name = match["file"]
    folder = KERNELS if name.startswith("common/") else KERNELS / kernel
    path = Path(name) if Path(name).is_absolute() else folder / name
    return f"{from_root(path)}:{match['line']}: "
