"""The engine's own kernels for NVIDIA GPUs, written in Triton: attention and what lies between the products.

`decode.py` is attention of one new token a sequence, `prefill.py` that of prompt chunks, and `softmax.py`
is what the two share; `elementwise.py` is everything of a plain layer that is neither attention nor a
product. Each kernel is compiled at its first call for a dtype and a model's shape, and never again for
other counts of tokens, so that a warm-up leaves nothing to compile. Triton is imported here alone, and
this package only where the device is a GPU; tests also run it in Triton's interpreter.
"""
