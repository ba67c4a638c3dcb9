"""The part of the release notes for those who install it: commands, needs, what changed."""

from __future__ import annotations

import re
from pathlib import Path

from build_kernels.errors import BuildError
from build_kernels.release import changelog
from build_kernels.release.wheel import Project
from router_runtime.format.advice import DRIVER
from router_runtime.format.provenance import SUMS_NAME
from router_runtime.version import __version__

#: The oldest and the newest torch that the tests run with.
_TORCH = ("tests/torch-oldest.txt", "tests/torch-newest.txt")


def text(root: Path, project: Project, wheel: str, sha256: str) -> str:
    """Return the guide to a release, in Markdown.

    Args:
        root: The checkout: its list of changes, and which releases of torch its tests run with.
        project: The wheel's metadata.
        wheel: The wheel's file name.
        sha256: Its digest.

    """
    changes = changelog.section((root / changelog.NAME).read_text(encoding="utf-8"), __version__)
    oldest, newest = (_version(root / path) for path in _TORCH)
    needs = {
        "Linux, Python": project.python,
        "torch": f"{project.requirement('torch')}; the tests run with {oldest} and {newest}",
        "cuda-bindings": project.requirement("cuda-bindings"),
        "NVIDIA driver, to use a GPU": DRIVER,
    }
    rows = "\n".join(f"| {what} | {which} |" for what, which in needs.items())
    return f"""## Check and install

In the folder with these files:

```
sha256sum --check {SUMS_NAME}
router-runtime verify-release . --key KEY.pub
pip install './{wheel}[signature]'
router-runtime doctor
```

The wheel's SHA-256 is `{sha256}`.

`KEY.pub` is the key that the releaser published, fetched from elsewhere than these files. The
second command needs a `router-runtime` that you trust already, of an earlier release or of a
checkout (`python -m router_runtime` there): a wheel cannot vouch for itself.

## What it needs

| what | which |
| --- | --- |
{rows}

## What changed since the last release

`build-kernels diff OLD NEW`, in a checkout, compares two releases cubin by cubin.

{changes}
"""


def _version(path: Path) -> str:
    found = re.fullmatch(r"torch==(\S+)\n", path.read_text(encoding="ascii"))
    if found is None:
        raise BuildError(
            f"expected one line torch==VERSION in {path}, found another text; next: restore it"
        )
    return found[1]
