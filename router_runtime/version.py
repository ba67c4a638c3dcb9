"""The version of the runtime, and of the release whose artifacts it may load. Stated here alone."""

__version__ = "0.1.0"
