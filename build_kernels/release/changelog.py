"""The section of CHANGELOG.md about a version: what changed since the release before it."""

from __future__ import annotations

import re

from build_kernels.errors import BuildError

NAME = "CHANGELOG.md"
_UNRELEASED = "Unreleased"
_HEADING = re.compile(r"^## +(\S+).*$", re.MULTILINE)


def section(text: str, version: str) -> str:
    """Return the text below the heading of ``version``, or below ``Unreleased`` where it has none.

    ``version`` is the runtime's own, without a commit. Raises BuildError if there is no such
    section, or nothing in it.
    """
    _, *parts = _HEADING.split(text)
    sections = {name: body.strip() for name, body in zip(parts[::2], parts[1::2], strict=True)}
    for name in (version, _UNRELEASED):
        if sections.get(name):
            return sections[name]
    raise BuildError(
        f"expected a section '## {version}' or '## {_UNRELEASED}' in {NAME} that says what changed "
        f"since the last release, found {', '.join(sections) or 'no section'}; next: write it"
    )
