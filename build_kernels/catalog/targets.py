"""The targets that cubins are built for. Data only.

``router_runtime/format/target.py`` says which devices each runs on.
"""

from __future__ import annotations

#: Targets with ``wgmma``, and targets with ``tcgen05``.
HOPPER = ("sm_90a",)
BLACKWELL = ("sm_100f", "sm_100a", "sm_103a", "sm_107a")

#: What a build makes unless ``--target`` says otherwise. ``sm_100f`` runs on the whole family 10.x,
#: so the targets for one of its members are built on request only: kernels/README.md compares them.
DEFAULT_TARGETS = ("sm_90a", "sm_100f")

#: Everything that ``--target`` takes.
TARGETS = (*HOPPER, *BLACKWELL)
