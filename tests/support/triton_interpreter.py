"""pytest -p triton_interpreter [--quick]: the operators' own tests with Triton's kernels in place of the CPU's.

The kernels run in Triton's interpreter, on CPU tensors: numpy does what a card would do, thousands of times slower. So
--quick leaves out what is large, and what another dtype or case shows as well.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read where Triton is imported
os.environ["SAIL_OPS_CHECK"] = "1"  # bad values raise, as they do on the CPU

import re
from typing import Any

import numpy
import pytest
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
_last_isa = testing.cpu_isas()[-1:]
testing.cpu_isas = lambda: _last_isa

QUICK = {  # what of a file to run: a pattern of the test's name
    "test_activation.py": "accuracy.*(empty|one|three)|halves.*float32|range|non_finite|checkpointing|bad_input",
    "test_grouped_mm.py": r"accuracy.*torch\.(float16|float32)-(weighted|along_k)-tail"
    r"|accuracy.*bfloat16-(plain|along_n)-first|tail_rows.*bfloat16|laid_out|wanted|views.*bfloat16|narrow.*3-2100",
    "test_moe.py": r"accuracy.*(no_token|odd|dropped)|biases.*torch\.(float32|bfloat16)|torch\.float16-torch\.int32"
    r"|read_nothing.*float32|all_ids|exactly_zero.*float32|torch\.float16-wider|by_columns|pair_is|torch\.float16-33",
    "test_moe_errors.py": "",
    "test_moe_training.py": "alone|neither|not_read|without_gradients|is_saved|added_to.*bfloat16.*(one-fp32|pair-as)"
    "|leave|overwritten|autocast|opcheck.*(added-fused|mm)",
    "test_norm.py": "accuracy.*(empty|one_row|three|bfloat16-wide)|float32-33|eps.*float32|views|wanted|outputs"
    "|bad_input",
    "test_routing.py": "accuracy.*(no_token|one_token|odd)|ties|nan|bias|replay|mask|outputs|bad_input",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        items[:] = [i for i in items if re.search(QUICK[i.path.name], i.name)]
