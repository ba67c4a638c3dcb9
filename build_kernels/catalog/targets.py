"""The targets that cubins are built for. Data only."""

from __future__ import annotations

#: What a build makes unless ``--target`` says otherwise.
DEFAULT_TARGETS = ("sm_90a", "sm_100a", "sm_103a")

#: Everything that ``--target`` takes. ``sm_100f`` runs on 10.0, 10.3 and later 10.x.
TARGETS = (*DEFAULT_TARGETS, "sm_100f")
