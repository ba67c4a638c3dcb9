"""An emulated CUDA driver that runs synthetic cubins with the oracle, and those cubins.

``contracts.py`` and ``artifacts.py`` make manifest entries and folders; ``calls.py`` answers the
driver's calls; ``execution.py`` executes a launch by reading the argument memory as the hardware
would and running the oracle on it; ``install.py`` puts it all in the place of the real driver. The
fixtures ``build``, ``fake`` and ``gpu`` of tests/runtime/conftest.py are the way in for tests.

The launch configuration and the enums are those of the installed ``cuda.bindings``, so a test
fails if a version of the bindings lays them out differently.
"""
