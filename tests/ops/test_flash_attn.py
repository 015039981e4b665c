"""SAIL_OPS_ATTENTION=flash_attn: what is handed to the package, and what becomes of its answers.

The package is a stand-in (flash_attn_stand_in.py). CPU tensors take the place of CUDA's.
"""

import math
import os
import subprocess
import sys
from typing import Any

import flash_attn_stand_in
import pytest
import torch
from conftest import DEVICE
from flash_attn_stand_in import CALLS
from torch import Tensor

import sail_ops
from sail_ops import _flash_attn, reference, testing


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(_flash_attn, "ASKED", "flash_attn")
    monkeypatch.setattr(_flash_attn, "DEVICE", "cuda" if DEVICE == "cuda" else "cpu")
    return flash_attn_stand_in.install(monkeypatch)


def inputs(S: int = 9, L: int = 12, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    shapes = (2, S, 4, 64), (2, L, 2, 64), (2, L, 2, 64)
    return [testing.random(*shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention(flash_attn: Any, causal: bool, scale: float | None) -> None:
    kwargs = {"causal": causal, "softmax_scale": scale}
    testing.check_op(sail_ops.attention, reference.attention, *inputs(), **kwargs)
    assert CALLS == [{"deterministic": False, "dropout": 0.0}]
    _, lse = sail_ops.attention(*inputs(), **kwargs, return_lse=True)
    assert torch.equal(lse, reference.attention(*inputs(), **kwargs, return_lse=True)[1])


@pytest.mark.parametrize("causal", [False, True])
def test_attention_varlen(flash_attn: Any, causal: bool) -> None:
    pack = [t.detach()[0].requires_grad_() for t in inputs(20, 20)]
    cu = torch.tensor([0, 7, 7, 20]).int()
    testing.check_op(
        sail_ops.attention_varlen, reference.attention_varlen, *pack, cu, cu, 13, 13, causal=causal, softmax_scale=0.3
    )
    assert CALLS == [{"longest": (13, 13)}]


def test_rows_that_see_no_key(flash_attn: Any) -> None:
    with torch.no_grad():
        _, lse = sail_ops.attention(*inputs(9, 4), causal=True, return_lse=True)
    assert (lse[..., :5] == -math.inf).all() and lse[..., 5:].isfinite().all()


def test_a_gradient_of_lse_is_refused(flash_attn: Any) -> None:
    out, lse = sail_ops.attention(*inputs(), return_lse=True)
    out.float().sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="lse: got a gradient, which flash_attn"):
        (out.float().sum() + lse.sum()).backward()


def test_torchs_switch_makes_it_deterministic(flash_attn: Any) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # the stand-in is none on a card
    try:
        sail_ops.attention(*inputs())
    finally:
        torch.use_deterministic_algorithms(False)
    assert CALLS[-1]["deterministic"]


def test_compiled(flash_attn: Any) -> None:
    compiled = torch.compile(sail_ops.attention, fullgraph=True, backend="aot_eager")
    testing.assert_same(testing.run(compiled, *inputs()), testing.run(sail_ops.attention, *inputs()))


def test_other_devices_and_fp32_stay_ours(flash_attn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _flash_attn.takes(inputs(dtype=torch.float32)[0])
    monkeypatch.setattr(_flash_attn, "DEVICE", "another")
    sail_ops.attention(*inputs())
    assert not CALLS


def test_unset_is_ours(flash_attn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flash_attn, "ASKED", "sail")
    sail_ops.attention(*inputs())
    assert not CALLS


def test_a_missing_or_old_package_is_named(flash_attn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flash_attn.__version__ = "2.5.9"
    with pytest.raises(ValueError, match="got flash_attn 2.5.9, expected 2.6 or newer"):
        sail_ops.attention(*inputs())
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match="got 'flash_attn', which cannot be imported here .*: install flash-attn"):
        sail_ops.attention(*inputs())


@pytest.mark.cpu_only
def test_an_unknown_choice_names_those_there_are() -> None:
    code = "import torch, sail_ops; sail_ops.attention(*[torch.ones(1, 1, 1, 8)] * 3)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=with_choice("flash"))
    assert "ValueError: SAIL_OPS_ATTENTION: got 'flash', expected one of sail, flash_attn" in ran.stderr


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "choice, said",
    [
        ("sail", "attention of bf16 and fp16: sail_ops' kernels"),
        ("flash", "got 'flash', expected one of sail, flash_attn"),
        ("flash_attn", "attention of bf16 and fp16: flash_attn 2.8.3 (SAIL_OPS_ATTENTION=flash_attn)"),
    ],
)
def test_report(choice: str, said: str, tmp_path: Any) -> None:
    (tmp_path / "flash_attn.py").write_text('__version__ = "2.8.3"')
    environment = with_choice(choice)
    environment["PYTHONPATH"] = f"{tmp_path}:{environment.get('PYTHONPATH', '')}"
    ran = subprocess.run([sys.executable, "-m", "sail_ops"], capture_output=True, text=True, env=environment)
    assert said in ran.stdout and (ran.returncode == 0) == (choice != "flash")


def with_choice(choice: str) -> dict[str, str]:
    return os.environ | {"SAIL_OPS_ATTENTION": choice}
