"""The benchmarks of a card on a CPU: a clock in place of its events, tensors of tiny sizes, and the tables of a run."""

import inspect
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flash_attn_stand_in
import pytest
import torch
from conftest import DEVICE

pytest.importorskip("pytest_benchmark")
pytest.importorskip("transformers")

from benchmarks import bench_attention, bench_loss, bench_norm, bench_step, events, liger, report
from benchmarks import bench_attention_cuda as attention
from benchmarks import bench_loss_cuda as loss
from benchmarks import bench_moe_cuda as moe
from benchmarks import bench_norm_cuda as norm
from benchmarks import bench_step_cuda as step
from benchmarks.cases import MoeCase
from benchmarks.conftest import installed
from benchmarks.harness import Steps
from benchmarks.limits import Limits
from sail_model.attention import Pack
from sail_ops import _library, reference

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the benchmarks' own arithmetic")
LIMITS = Limits({"bf16": 400.0}, 30.0, 20.0, 25.0)
# torch's CPU has no such kernels, and these packages none at all
NOT_HERE = {"sdpa_cudnn", "sdpa_efficient", "torch_varlen", "liger"}


class Benchmark(SimpleNamespace):
    """What the fixture of pytest-benchmark does for a card's row."""

    def pedantic(self, function: Callable[[], object], setup: Callable[[], object], rounds: int) -> None:
        setup(), function()


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAIL_BENCH_SIZE", "tiny")
    monkeypatch.setattr(events, "DEVICE", "cpu")
    monkeypatch.setattr(events, "Events", events.WallClock)
    for module in (attention, loss, moe, norm, step):
        monkeypatch.setattr(module, "BUDGET", 0.0)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**22)
    for op, implementations in bench_norm.OPS.items():  # compiled code is `make bench`'s, and takes minutes
        monkeypatch.setitem(implementations, "compiled", getattr(reference, op))
    monkeypatch.setitem(bench_loss.LOSSES, "compiled", bench_loss.full_logits)
    monkeypatch.setattr(bench_attention, "compiled_attention", reference.attention)
    flash_attn_stand_in.install(monkeypatch)


def row(test: Callable[..., None], *arguments: Any, limits: tuple[Limits, ...] = (LIMITS,)) -> dict[str, Any]:
    """What a case records."""
    benchmark = Benchmark(extra_info={})
    test(benchmark, *arguments, *limits)
    return benchmark.extra_info


def compare(steps: Steps, results: Callable[[], list[Any]], names: list[str]) -> None:
    """Every implementation's results and gradients are the first one's."""
    want: list[Any] = []
    for name in names:
        steps.prepare(name)
        steps.run(name)
        got = [t.clone() for t in results() if t is not None]
        want = want or got
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", attention.CASES.values(), ids=attention.CASES.keys())
def test_every_attention_peer_computes_the_case(case: bench_attention.Case) -> None:
    steps = attention.CardSteps(bench_attention.sized(case)._replace(dtype="fp32"))
    names = ["sail", *(name for name in attention.peers_of(case) if name not in NOT_HERE)]
    assert "flash_attn" in names and len(names) > 2
    if steps.mask is not None:  # torch's own flash kernel takes no mask
        names.remove("sdpa_flash")
    for name in names:
        torch.testing.assert_close(steps.forward(name), steps.forward("sail"), rtol=1e-4, atol=1e-4)
    if case.mode == "train":
        compare(steps, lambda: [t.grad for t in steps.inputs], names)


def test_the_efficient_backend_gets_every_query_heads_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = attention.CardSteps(bench_attention.Case((16, 16), 4, 2, 64, dtype="fp32"))
    monkeypatch.setattr(attention, "sdpa_kernel", lambda backend: torch.no_grad())
    torch.testing.assert_close(steps.forward("sdpa_efficient"), steps.forward("sail"), rtol=1e-4, atol=1e-4)


def test_torchs_packed_attention_has_the_arguments() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    steps = attention.CardSteps(bench_attention.Case((3, 5), 4, 2, 64))
    inspect.signature(varlen.varlen_attn).bind(
        *steps.inputs, steps.cu_q, steps.cu_k, *steps.longest, window_size=(-1, 0), enable_gqa=True
    )


@pytest.mark.parametrize("op", bench_norm.OPS)
def test_every_norm_peer_computes_the_operator(op: str) -> None:
    steps = bench_norm.NormSteps(op, torch.float32, bench_norm.SHAPES["tiny"], "cpu")
    peers = bench_norm.peers_of(op)
    assert ("transformers" in peers) == ("rms_norm" in op or op == "qk_norm_rope")
    for name in peers:
        torch.testing.assert_close(steps.gradients(name), steps.gradients("sail"), rtol=1e-3, atol=1e-4)


def test_every_loss_computes_the_loss() -> None:
    steps = bench_loss.LossSteps(torch.float32, bench_loss.SHAPES["tiny"], "cpu")
    compare(steps, lambda: [steps.hidden_TD.grad, steps.lm_head_VD.grad], ["sail", *bench_loss.PEERS])


def test_both_layers_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the layer and of each of its parts; the weights are shared, their gradients are each layer's own."""
    steps = bench_step.LayerSteps("fp32", "tiny", "cpu", (5, 1, 13))
    for part in ("", *(f" {name}" for name in bench_step.PARTS)):
        compare(steps, lambda: [steps.x_BLD.grad], [f"sail{part}", f"transformers{part}"])


def test_no_tensor_stays_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices in one operator raise on meta tensors too."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which meta has none of
    for op in bench_norm.OPS:
        one_step(bench_norm.NormSteps(op, torch.bfloat16, bench_norm.SHAPES["tiny"], "meta"), "sail", "torch")
    one_step(bench_loss.LossSteps(torch.bfloat16, bench_loss.SHAPES["tiny"], "meta"), "sail", "cross_entropy")
    for case in map(bench_attention.sized, attention.CASES.values()):
        steps = attention.CardSteps(case, "meta")
        one_step(steps, "sail", *["sdpa"] * steps.uniform)
    monkeypatch.setattr(bench_step, "pack_of", lambda cu_seqlens: Pack(cu_seqlens, 13))  # the others ask for values
    monkeypatch.setattr(bench_step, "packed_positions", lambda cu_seqlens: torch.arange(19, device="meta"))
    one_step(bench_step.LayerSteps("bf16", "tiny", "meta", (5, 1, 13)), "sail", "transformers")


def one_step(steps: Steps, *names: str) -> None:
    for name in names:
        steps.prepare(name)
        steps.run(name)


def test_packs_have_their_tokens() -> None:
    assert [sum(step.pack(n)) for n in (16, 4028, 8192, 32768)] == [16, 4028, 8192, 32768]
    assert min(map(min, map(step.pack, (16, 4028, 8192, 32768)))) > 0


def test_a_run_and_its_tables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every family's rows through its own test, and the report of them all."""
    monkeypatch.setattr(loss, "SHAPE", bench_loss.SHAPES["tiny"])
    case = MoeCase("bf16", "uniform", 64, "train", "fresh", "tiny")
    monkeypatch.setattr(moe, "peers_of", lambda case: ["grouped_mm", "liger", "sail_recompute", "sail_cluster"])
    monkeypatch.setattr(_library, "HAS_CUDA", False)
    rows = [row(moe.test_fused_experts, case)]
    rows += [row(attention.test_attention, name) for name in ("S1024-train", "ragged-train", "decode8")]
    rows += [row(norm.test_norm, op, bench_norm.SHAPES["tiny"], limits=()) for op in bench_norm.OPS]
    rows += [row(loss.test_loss), row(step.test_decoder_layer, 16), row(step.test_decoder_layer, 20)]
    for r in rows:
        assert r["ms"]["sail"] > 0 and set(r["speedup"]) | set(r["not_measured"]) > {"liger"} or "flash_attn" in r["ms"]
    machine = {
        "cpu": {"brand_raw": "CPU"},
        "card": {"name": "A card"},
        "cuda": "13.0",
        "versions": {"torch": "2"},
        "threads": 8,
        "size": "full",
        "limits": LIMITS.as_dict(),
    }
    results = {
        "benchmarks": [{"extra_info": r} for r in rows],
        "machine_info": machine,
        "commit_info": {"id": "0123456789", "dirty": False},
        "datetime": "2026-01-01T00:00:00",
    }
    (tmp_path / "a-card").mkdir()
    (tmp_path / "a-card" / "all.json").write_text(json.dumps(results))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.main(["another"]) == 1 and "there are: a-card" in capsys.readouterr().out
    assert report.main(["a-card"]) == 0
    text = capsys.readouterr().out
    for said in ("A card, CUDA 13.0, 8 threads of CPU;", "x flash-attn", "x by sequence", "T=16 whole", "T=20 peak"):
        assert said in text
    assert rows[0]["not_measured"]["sail_cluster"].startswith("RuntimeError: sail_ops: the CUDA library is not built")
    why = [line for line in text.splitlines() if "| liger " in line]
    assert {line.split("|")[1].strip() for line in why} == {"moe", "norm", "loss", "step"}


def test_clusters_are_a_row_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an expert has two row tiles on average, and by a switch that every other row puts back."""
    cases = [MoeCase("bf16", "uniform", T, "train", "fresh", "full", "cuda") for T in (1024, 4096, 32768)]
    assert ["sail_cluster" in moe.peers_of(case) for case in cases] == [False, True, True]
    switched: list[str] = []
    monkeypatch.setattr(_library, "HAS_CUDA", True)
    monkeypatch.setattr(_library, "set_cuda_kernels", switched.append)
    steps = moe.CardLayer(MoeCase("bf16", "uniform", 64, "train", "fresh", "tiny"))
    compare(steps, lambda: [steps.x_TD.grad, *(w.grad for w in steps.weights)], ["sail", "sail_cluster", "sail"])
    assert switched == ["", "cluster", ""]
    monkeypatch.setattr(events, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "clusters are for compute capability 9.0" in events.failure(steps, "sail_cluster")


def test_a_peer_that_cannot_run_is_a_row_that_is_not_measured() -> None:
    steps = attention.CardSteps(bench_attention.Case((16, 16), 4, 2, 64, mode="forward"))
    runs, refused = events.usable(steps, ["sdpa", "sdpa_cudnn", "sdpa_flash"])
    assert runs == ["sdpa", "sdpa_flash"] and list(refused) == ["sdpa_cudnn"]
    assert refused["sdpa_cudnn"].startswith("RuntimeError: ")


def test_versions_of_what_is_installed() -> None:
    assert installed("pytest-benchmark", "no-such-package") == {"pytest-benchmark": version("pytest-benchmark")}


def test_ligers_functions_have_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels need a card: what is called, is bound to the signatures."""
    functional = pytest.importorskip("liger_kernel.transformers.functional")
    called = []

    def bound(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            inspect.signature(getattr(functional, name)).bind(*args, **kwargs)
            called.append(name)
            return args[:2] if name in ("liger_rope", "liger_fused_add_rms_norm") else args[0]

        return call

    names = [name for name in vars(functional) if name.startswith("liger_")]
    monkeypatch.setattr(liger, "functions", lambda: SimpleNamespace(**{name: bound(name) for name in names}))
    for op in bench_norm.OPS:
        steps = bench_norm.NormSteps(op, torch.float32, bench_norm.SHAPES["tiny"], "cpu")
        liger.OPS[op](*steps.inputs, *steps.tables)
    steps = bench_loss.LossSteps(torch.float32, bench_loss.SHAPES["tiny"])
    liger.linear_cross_entropy(steps.hidden_TD, steps.lm_head_VD, steps.labels_T)
    assert len(set(called)) == 6


def test_ligers_layer_is_made_and_transformers_is_as_before() -> None:
    pytest.importorskip("liger_kernel.transformers")
    before = {name: getattr(liger.modeling_qwen3_moe, name) for name in liger.PATCHED}
    steps = bench_step.LayerSteps("fp32", "tiny")
    for name in ("liger", "transformers"):
        steps.prepare(name)
    kinds = {name: {type(m).__name__ for m in layer.modules()} for name, layer in steps.layers.items()}
    assert {"LigerRMSNorm", "LigerExperts"} <= kinds["liger"]
    assert not any("Liger" in kind for kind in kinds["transformers"])
    assert {name: getattr(liger.modeling_qwen3_moe, name) for name in liger.PATCHED} == before
    with liger.patched():
        assert liger.modeling_qwen3_moe.apply_rotary_pos_emb is not before["apply_rotary_pos_emb"]
