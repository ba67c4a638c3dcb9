"""Settings that every test shares."""

from __future__ import annotations

import contextlib

# The builder's environment has neither hypothesis nor torch, and its tests need neither.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    # Reproducible: a failure on one machine is a failure on all. No deadline: machines differ.
    settings.register_profile("reproducible", derandomize=True, deadline=None, print_blob=True)
    settings.load_profile("reproducible")
