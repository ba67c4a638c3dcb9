"""The command ``router-runtime``."""
