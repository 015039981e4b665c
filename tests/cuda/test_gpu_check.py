"""What `make gpu-check` runs on a card beside the suites holds on the emulator, and it names what there is."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import check
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

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="it emulates a card whatever runs the operators")


@pytest.mark.parametrize("name", small_steps.STEPS)
def test_small_steps(name: str) -> None:
    with emulated():
        small_steps.STEPS[name]("cpu")


def test_the_step_of_graphs_and_streams() -> None:
    with emulated():
        first, again = (test_cuda_device.step(Layer(*detached(*layer(CASE, torch.bfloat16)))) for _ in range(2))
    test_cuda_device.assert_equal(again, first)
    assert len(first) > 30 and all(t.isfinite().all() for t in first)


def test_every_file_is_there() -> None:
    named = [word for stage in check.stages().values() for word in stage.command if word.endswith(".py")]
    assert len(named) > 20 and [word for word in named if not (check.ROOT / word).exists()] == []


def test_triton_runs_the_suites_of_its_interpreter() -> None:
    import test_triton_numerics

    assert sorted(sum(check.TRITON_SUITES.values(), [])) == sorted(test_triton_numerics.FILES)


def test_a_stage_is_ok_or_failed_or_skipped(tmp_path: Path) -> None:
    def status(*command: str, **changes: Any) -> str:
        return check.run("stage", check.Stage([*command], **changes), dict(os.environ))[0]

    assert status(sys.executable, "-c", "") == "ok" and status(sys.executable, "-c", "exit(3)") == "FAILED"
    assert status("no-such-sanitizer") == "skipped" == status(sys.executable, "-c", "", needs="no_such_module")
    pid = tmp_path / "pid"
    assert status("sh", "-c", f"sleep 100 & echo $! > {pid}; wait", limit=0.5) == "FAILED"
    state = Path(f"/proc/{pid.read_text().strip()}/stat")
    deadline = time.monotonic() + 20  # a zombie where nobody waits for it
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the child outlived its stage"
        time.sleep(0.05)


def test_the_last_line_names_what_failed_and_what_was_skipped() -> None:
    results = {"a": "ok", "b": "skipped", "c": "FAILED", "d": "skipped"}
    assert check.verdict(results) == "gpu-check: 1 of 4 stages without a failure; FAILED: c; skipped: b, d"
    assert check.verdict({"a": "ok"}) == "gpu-check: 1 of 1 stages without a failure"


@pytest.mark.parametrize("triton", [True, False], ids=["with_triton", "without"])
def test_neither_library_nor_nvcc(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], triton: bool
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "card")
    monkeypatch.setattr(check, "LIBRARY", Path("/none/libsail_ops_cuda.so"))
    monkeypatch.setattr(check.shutil, "which", lambda _: None)
    monkeypatch.setattr(check.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda _: object() if triton else None)
    monkeypatch.setattr(check, "run", lambda name, *_: ran.append(name) or ("ok", 1.0))
    if not triton:
        with pytest.raises(SystemExit, match="no nvcc to build it, and Triton is not installed"):
            check.main([])
        return
    assert check.main([]) == 0
    assert ran == ["what is built", "Triton, expert layer", "Triton, grouped product, router, gate, norm"]
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == (
        "gpu-check: 3 of 3 stages without a failure;"
        " Triton alone: libsail_ops_cuda.so is missing and there is no nvcc to build it"
    )


def test_the_steps_name_every_operator() -> None:
    """A new operator is watched by the sanitizer, or this says so."""
    from sail_ops._backends import operators

    source = Path(small_steps.__file__).read_text()
    missing = [name for name in operators() if f"sail_ops.{name.removesuffix('_backward')}(" not in source]
    assert missing == ["grouped_experts", "grouped_experts_backward"]  # fused_experts' kernels
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


def test_every_operator_names_a_card_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not CUDA's "no kernel image". The card is looked up once a thread: here it is a supported one, then none."""
    from sail_ops._backends import operators

    x, gate_up, down, _, _ = (t.detach().requires_grad_(t.is_floating_point()) for t in layer(CASE, torch.bfloat16))
    ends = torch.arange(1, CASE.E + 1).mul(12).int()
    with emulated():
        with Calls() as calls:
            for step in small_steps.STEPS.values():
                step("cpu")
            sail_ops.grouped_experts(x, gate_up, down, ends).float().sum().backward()
        assert sorted(calls.kept) == operators()
        monkeypatch.setenv("SAIL_EMULATED_CARD", "12.0 4 101376")
        with ThreadPoolExecutor(1) as another:
            said = {name: another.submit(op, *args).exception() for name, (op, args) in calls.kept.items()}
    want = "sail_ops.{}: no CUDA kernel for the emulator (sm_120): this library was built for sm_80; build for it with"
    assert {name: str(error).split(" SAIL_OPS_CUDA_ARCHS")[0] for name, error in said.items()} == {
        name: want.format(name) for name in operators()
    }


CODE = """
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
