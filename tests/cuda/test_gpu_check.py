"""What `make gpu-check` runs on a card beside the suites holds on the emulator, and it names what there is."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import small_steps
import test_cuda_device
import torch
from conftest import DEVICE
from emulated_library import emulated
from expert_layer import Layer, detached, layer
from test_cuda_device import CASE
from torch.utils._python_dispatch import TorchDispatchMode

import sail_ops
from sail_ops._backends import LINEAR, operators

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="it emulates a card whatever runs the operators")
ON_CPUS_ONLY = set(LINEAR)  # elsewhere torch's


def test_the_step_of_graphs_and_streams() -> None:
    with emulated():
        first, again = (test_cuda_device.step(Layer(*detached(*layer(CASE, torch.bfloat16)))) for _ in range(2))
    test_cuda_device.assert_equal(again, first)
    assert len(first) > 30 and all(t.isfinite().all() for t in first)


def test_the_steps_name_every_operator() -> None:
    """A new operator is watched by the sanitizer, or this says so."""
    source = Path(small_steps.__file__).read_text()
    missing = {name for name in operators() if f"sail_ops.{name.removesuffix('_backward')}(" not in source}
    assert missing - ON_CPUS_ONLY == {"grouped_experts", "grouped_experts_backward"}  # fused_experts' kernels
    assert torch.ops.sail_ops.grouped_experts


class Calls(TorchDispatchMode):
    """The last call of every operator of sail_ops that has something to do."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "sail_ops" and all(t.numel() for t in args[:3] if isinstance(t, torch.Tensor)):
            self.kept[op._opname] = op, args
        return op(*args, **(kwargs or {}))


def test_small_steps_and_a_card_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps run every operator; each of those names a card that the library has no code for, not CUDA's "no kernel
    image". The card is looked up once a thread: here it is a supported one, then none."""
    x, gate_up, down, _, _ = (t.detach().requires_grad_(t.is_floating_point()) for t in layer(CASE, torch.bfloat16))
    ends = torch.arange(1, CASE.E + 1).mul(12).int()
    with emulated():
        with Calls() as calls:
            for step in small_steps.STEPS.values():
                step("cpu")
            sail_ops.grouped_experts(x, gate_up, down, ends).float().sum().backward()
        assert calls.kept.keys() == set(operators()) - ON_CPUS_ONLY
        monkeypatch.setenv("SAIL_EMULATED_CARD", "12.0 4 101376")
        with ThreadPoolExecutor(1) as another:
            said = {name: another.submit(op, *args).exception() for name, (op, args) in calls.kept.items()}
    want = "sail_ops.{}: no CUDA kernel for the emulator (sm_120): this library was built for sm_80; build for it with"
    assert {name: str(error).split(" SAIL_OPS_CUDA_ARCHS")[0] for name, error in said.items()} == {
        name: want.format(name) for name in calls.kept
    }


CODE = """
import sys; sys.path.insert(0, "support")
import conftest, torch
conftest.make_everything_on("cpu")
from sail_ops import swiglu, testing
x, y = (testing.random(5, 64, dtype=torch.bfloat16, seed=i).requires_grad_() for i in range(2))
assert torch.Generator(device="cpu").manual_seed(1).device == torch.Generator().device == torch.device("cpu")
testing.check_traceable(swiglu, x, y)
torch.library.opcheck(torch.ops.sail_ops.swiglu.default, (x.detach(), y.detach()))
torch.utils.checkpoint.checkpoint(swiglu, x, y, use_reentrant=False).sum().backward()
print("traced")
"""


def test_torch_traces_with_generators_of_another_device() -> None:
    """torch imports its compiler when it is first asked for, and that names torch.Generator in annotations."""
    command = [sys.executable, "-c", CODE]
    result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert result.stdout == "traced\n", result.stderr
