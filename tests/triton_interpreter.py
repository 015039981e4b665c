"""pytest -p triton_interpreter: the operators' own tests with Triton's kernels in place of the CPU's.

The kernels run in Triton's interpreter, on CPU tensors: numpy does what a card would do, thousands of times slower.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read where Triton is imported
os.environ["SAIL_OPS_CHECK"] = "1"  # bad values raise, as they do on the CPU

from typing import Any

import numpy
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

from sail_ops import _triton, testing

# ---- the interpreter keeps bf16 as uint16, truncates where a card rounds, and multiplies the integers
_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def cast(self: InterpreterBuilder, src: TensorHandle, to: Any) -> TensorHandle:
    if src.dtype.scalar.is_bf16() and to.scalar.is_fp32():
        return wide(src)
    if src.dtype.scalar.is_fp32() and to.scalar.is_bf16():
        rounded = torch.from_numpy(numpy.array(src.data)).bfloat16().view(torch.int16)
        return TensorHandle(rounded.numpy().view(numpy.uint16), tl.bfloat16)
    return _cast(self, src, to)


def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    return _dot(self, wide(a), wide(b), *rest)


def wide(t: TensorHandle) -> TensorHandle:
    if not t.dtype.scalar.is_bf16():
        return t
    return TensorHandle((t.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)


InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot

# ---- in place of the CPU's kernels; all instruction sets would mean the same ones
_triton.register(_triton.OPERATORS, "", "CPU")
testing.cpu_isas = lambda isas=testing.cpu_isas(): isas[-1:]
