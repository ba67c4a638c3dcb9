"""Settings that every test shares."""

from __future__ import annotations

import contextlib
import os

# Artifacts that others may write are refused, so what the tests write is writable by nobody else.
os.umask(os.umask(0o022) | 0o022)

# The builder's environment has neither hypothesis nor torch, and its tests need neither.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    # Reproducible: a failure on one machine is a failure on all. No deadline: machines differ.
    settings.register_profile("reproducible", derandomize=True, deadline=None, print_blob=True)
    settings.load_profile("reproducible")
