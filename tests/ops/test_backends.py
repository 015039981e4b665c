"""sail_ops.supports: its answer is what a call does, on the CPU, the emulated CUDA library or a card."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICE

import sail_ops
from sail_ops import _backends, _flash_attn, _triton, supports

CU = torch.tensor([0, 2, 3], dtype=torch.int32)
ENDS = torch.tensor([1, 3], dtype=torch.int32)
BACKEND = {"cpu": "cpu", "emulated": "cuda", "cuda": None}[DEVICE]
KIND = "cpu" if DEVICE == "cpu" else "cuda"
ops = torch.ops.sail_ops


def ones(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def norm(dtype: torch.dtype) -> Any:
    return ops.rms_norm(ones(3, 8, dtype=dtype), ones(8, dtype=dtype), 1e-6)


def uneven_norm(dtype: torch.dtype) -> Any:
    return ops.rms_norm(ones(2, 3, 8, dtype=dtype)[:, :2], ones(8, dtype=dtype), 1e-6)


def product(dtype: torch.dtype) -> Any:
    return ops.grouped_mm(ones(3, 8, dtype=dtype), ones(2, 8, 8, dtype=dtype), ENDS)


def attention(dtype: torch.dtype, head_dim: int = 16) -> Any:
    q = ones(1, 3, 2, head_dim, dtype=dtype)
    return ops.attention(q, q, q, 1.0, True)


CALLS: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    "norm": (norm, "rms_norm", {}),
    "uneven": (uneven_norm, "rms_norm", {"even_rows": False}),
    "grouped_mm": (product, "grouped_mm", {}),
    "attention": (attention, "attention", {"head_dim": 16}),
    "head_12": (lambda dtype: attention(dtype, 12), "attention", {"head_dim": 12}),
    "head_136": (lambda dtype: attention(dtype, 136), "attention", {"head_dim": 136}),
    "head_264": (lambda dtype: attention(dtype, 264), "attention", {"head_dim": 264}),
}


@pytest.mark.parametrize("dtype", [*_backends.DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_answer_is_what_the_call_does(name: str, dtype: torch.dtype) -> None:
    call, op, options = CALLS[name]
    answer = supports(op, KIND, dtype, backend=BACKEND, **options)
    if answer:
        call(dtype)
        return
    with pytest.raises(ValueError) as raised:
        call(dtype)
    assert answer.reason in str(raised.value)


EXPECTED = [
    ("cpu", "attention", torch.float32, {"head_dim": 256}, True),
    ("cpu", "attention", torch.float32, {"head_dim": 257}, False),
    ("cpu", "rms_norm", torch.float64, {}, False),
    ("cpu", "rms_norm", torch.float32, {"even_rows": False}, True),
    ("cuda", "attention", torch.bfloat16, {"head_dim": 128}, True),
    ("cuda", "attention_varlen_backward", torch.bfloat16, {"head_dim": 12}, False),
    ("cuda", "attention", torch.float32, {"head_dim": 128}, False),
    ("cuda", "fused_experts_backward", torch.float32, {}, False),
    ("cuda", "fused_experts", torch.float16, {}, True),
    ("cuda", "layer_norm_backward", torch.float32, {"even_rows": False}, False),
    ("triton", "fused_experts", torch.float32, {}, True),
    ("triton", "layer_norm", torch.float32, {}, False),
    ("flash_attn", "attention", torch.float32, {}, False),
    ("flash_attn", "attention", torch.float16, {"head_dim": 256}, True),
]


@pytest.mark.parametrize("backend, op, dtype, options, expected", EXPECTED)
def test_limits_of_every_backend(
    backend: str, op: str, dtype: torch.dtype, options: dict[str, Any], expected: bool
) -> None:
    answer = supports(op, "cpu" if backend == "cpu" else "cuda", dtype, backend=backend, **options)
    assert bool(answer) == expected and answer.backend == backend and answer.reason


def test_who_serves_cuda_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "TRITON", {"rms_norm": "the CUDA library is not built"})
    monkeypatch.setattr(_backends, "has_kernel", lambda op, key: op == "attention" and key == "CUDA")
    monkeypatch.setattr(_triton, "installed", lambda: True)
    bf16 = torch.bfloat16
    assert supports("rms_norm", "cuda:1", bf16) == (True, "triton", "the CUDA library is not built")
    assert supports("attention", torch.device("cuda"), bf16).backend == "cuda"
    assert supports("layer_norm", "cuda", bf16) == (False, "", "no kernel of layer_norm for cuda")
    assert not supports("attention", "npu", bf16)
    monkeypatch.setattr(_triton, "installed", lambda: False)
    assert supports("rms_norm", "cuda", bf16) == (
        False,
        "",
        "the CUDA library is not built, and Triton is not installed",
    )
    monkeypatch.setattr(_flash_attn, "ASKED", "flash_attn")
    assert supports("attention", "cuda", bf16).backend == "flash_attn"
    assert supports("attention", "cuda", torch.float32).backend == "cuda"
    assert supports("attention_backward", "cuda", bf16).backend == ""


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="op: got 'softmax', expected one of add_layer_norm, "):
        supports("softmax", "cpu", torch.float32)
    with pytest.raises(ValueError, match="device: got 'tpu', expected one of cpu, cuda, npu"):
        supports("rms_norm", "tpu:0", torch.float32)
    assert sail_ops.supports is supports
