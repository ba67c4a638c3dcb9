"""The version of the runtime, and of the release whose artifacts it may load. Stated here alone.

In a release's wheel it ends with the commit, ``0.1.0+g<commit>``, and with a digest of the changes
if the checkout had any: wheels of different contents have different versions, so that pip replaces
one by the other.
"""

__version__ = "0.1.0"
