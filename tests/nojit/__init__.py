"""Proof that serving compiles nothing, writes nothing and starts nothing.

``fresh`` makes an environment of the installed package, torch and cuda-python alone, and runs
``serve`` in it; ``serve`` runs every op between the locks of ``lockdown``.
"""
