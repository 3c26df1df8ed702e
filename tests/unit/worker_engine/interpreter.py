"""Triton's interpreter, made to compute what the compiled kernels compute.

It keeps bfloat16 as bits: as it stands, products would multiply the bits as integers, and numbers would be
cut instead of rounded to the nearest; and its loops take bounds that NumPy since 2.4 does not call numbers.
All three are put right here. Where there is a GPU nothing is changed.
"""

from __future__ import annotations

import numpy as np
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def widened(bits):
    """bfloat16's bits to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(numbers):
    """float32 to bfloat16's bits, to the nearest, ties to even."""
    wide = numbers.astype(np.float32).view(np.uint32)
    rounded = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16)


def repair():
    """Once for a process. Raises RuntimeError when Triton was imported as a compiler, without a GPU."""
    import triton.language as tl
    from triton.language.standard import max as some_function
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if not isinstance(some_function, interpreter.InterpretedFunction):
        raise RuntimeError("Triton was imported before TRITON_INTERPRET was set: see tests/conftest.py")
    plain_cast, plain_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast(self, src, dst_type):
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(widened(src.data), dst_type.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(narrowed(src.data), dst_type.scalar)
        if tl.bfloat16 in kinds:
            raise TypeError(f"the interpreter is not put right for a conversion of {kinds[0]} to {kinds[1]}")
        return plain_cast(self, src, dst_type)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        parts = [
            TensorHandle(widened(part.data), tl.float32) if part.dtype.scalar == tl.bfloat16 else part
            for part in (a, b)
        ]
        return plain_dot(self, *parts, d, input_precision, max_num_imprecise_acc)

    plain_patch = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        plain_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch
    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_dot = dot


if DEVICE.type == "cpu":
    repair()
