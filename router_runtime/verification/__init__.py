"""The oracle suite: its inputs, what is expected of a kernel, and the comparison on a device; and
how long Routers take there.
"""
