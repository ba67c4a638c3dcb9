"""The benchmark: ``make bench``. See ``cli.py`` for what it measures and its options."""
