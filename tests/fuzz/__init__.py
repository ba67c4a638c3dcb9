"""Any bits into every op, and what router_runtime/PROMISES.md promises of the results.

``python -m tests.fuzz --rows 10000000`` on a GPU (``--rows 3000`` under compute-sanitizer). The
tests run the same with fewer rows, on the CPU too, where the ops are the oracle.

Every tensor that an op gets lies between two guard bands, whose bytes differ between two runs with
the same content: a write outside changes a band, and a read outside that matters changes the
result. Outputs start poisoned, so an element that was not written shows. After each call a canary,
a call with known results, shows whether the next launch is affected.
"""
