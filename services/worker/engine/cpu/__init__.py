"""The engine's own kernels for CPUs: products, attention and what lies between them, in C++.

`build.py` compiles `kernels.cpp` once, when the project is installed; `library.py` opens what fits this
processor; `kernels.py` calls it with tensors. Without a compiled library the engine runs on torch's own
operators, slower and otherwise the same.
"""
