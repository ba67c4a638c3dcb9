"""Files that Python imports in place of an installed package, such as a user's own module ``cuda``.

Python looks into the working directory first, so a file of the user's hides a package of its name.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path


def shadow(module: str, distribution: str) -> Path | None:
    """Return the file or the folder that Python imports as ``module``, or as a package that it is
    in, though ``distribution`` has it. None if there is none, or if that is not installed.
    """
    try:
        installed = importlib.metadata.files(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    own = {Path(str(file.locate())).resolve() for file in installed or ()}
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}".lstrip(".")
        origin = _origin(name)
        if origin is not None and origin not in own:
            return origin.parent if origin.name == "__init__.py" else origin
    return None


def _origin(name: str) -> Path | None:
    """The file of a module; None if it has none, as a package that is only a folder."""
    try:
        module = sys.modules.get(name)
        spec = importlib.util.find_spec(name) if module is None else module.__spec__
    except Exception:  # of the package that the module is in: its own file was looked at before
        return None
    if spec is None or spec.origin is None or not spec.has_location:
        return None
    return Path(spec.origin).resolve()
