"""The maths of benchmarks: which requests are sent when, and what their times amount to.

Nothing here does I/O, reads a clock or draws from a global source, and only plain stdlib, msgspec and
this package are imported: the load client, the in-process engine bench and the comparison with peers
share it, so that their figures mean the same.
"""
