"""The benchmarks of a card on a CPU: a clock in place of its events, tensors of tiny sizes, and the tables of a run."""

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
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

from benchmarks import bench_attention, bench_loss, bench_norm, bench_step, events, graphs, liger, report, tables
from benchmarks import bench_attention_cuda as attention
from benchmarks import bench_grouped_mm_cuda as grouped
from benchmarks import bench_loss_cuda as loss
from benchmarks import bench_moe_cuda as moe
from benchmarks import bench_norm_cuda as norm
from benchmarks import bench_step_cuda as step
from benchmarks.cases import MoeCase, cuda_cases
from benchmarks.conftest import installed
from benchmarks.harness import Steps
from benchmarks.limits import Limits
from benchmarks.rows import failure, usable
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
    for module in (attention, grouped, loss, moe, norm, step):
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
    benchmark = Benchmark(name=test.__name__, extra_info={})
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
    rows += [row(attention.test_attention, name, False) for name in ("S1024-train", "ragged-train", "decode8")]
    rows += [row(norm.test_norm, op, bench_norm.SHAPES["tiny"], False, limits=()) for op in bench_norm.OPS]
    rows += [row(grouped.test_grouped_mm, mode, layout) for mode, layout in grouped.CASES]
    rows += [row(loss.test_loss), row(step.test_decoder_layer, 16), row(step.test_decoder_layer, 20)]
    for r in rows:
        peers = {"grouped_mm": "torch", "attention": "flash_attn"}
        assert r["ms"]["sail"] > 0 and peers.get(r["family"], "liger") in set(r["speedup"]) | set(r["not_measured"])
        assert r["kernels"].keys() == r["ms"].keys() and "sail" in r["launches"]
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
    for said in (
        "A card, CUDA 13.0, 8 threads of CPU;",
        "weight gradient, w nk",
        "x F.grouped_mm",
        "x flash-attn",
        "x by sequence",
        "T=16 whole",
        "T=20 peak",
    ):
        assert said in text
    assert rows[0]["not_measured"]["sail_cluster"].startswith("RuntimeError: sail_ops: the CUDA library is not built")
    why = [line for line in text.splitlines() if "| liger " in line]
    assert {line.split("|")[1].strip() for line in why} == {"moe", "norm", "loss", "step"}


def test_every_grouped_product_is_torchs() -> None:
    """Both layouts, and the gradient laid out as w is."""
    for mode, layout in grouped.CASES:
        steps = grouped.GroupedMmSteps(mode, layout, 64, "tiny")
        results = {}
        for name in ("sail", "torch"):
            steps.prepare(name)
            results[name] = steps.result(name)
        torch.testing.assert_close(results["sail"], results["torch"], rtol=1e-2, atol=1e-2)
        contiguous = steps.w_EKN.is_contiguous() if layout == "kn" else steps.w_EKN.mT.is_contiguous()
        assert contiguous and steps.flops == 2 * 64 * 4 * 64 * 64
        if mode != "forward":
            assert results["sail"].stride() == steps.w_EKN.stride() and results["sail"].shape == steps.w_EKN.shape


class Replayed:
    """In a graph's place: what it recorded, run again."""

    def __init__(self, prepare: Callable[[], None], run: Callable[[], None]) -> None:
        prepare()
        self.replay = run


def test_rows_of_graphs_stand_beside_those_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding, norms, few tokens: each replay is a row of the same case. There is no capture without a card."""
    few = [case for case in cuda_cases() if case.graph]
    assert [case.id for case in few] == [
        "bf16-uniform-tiny-T64-forward-graph",
        "bf16-uniform-tiny-T64-train-fresh-graph",
    ]
    assert [name for name, graph in attention.ROWS if graph] == ["decode1", "decode8"]
    monkeypatch.setattr(graphs, "capture", Replayed)
    tiny = bench_norm.SHAPES["tiny"]
    rows = [row(attention.test_attention, "decode8", graph) for graph in (False, True)]
    rows += [row(norm.test_norm, "swiglu", tiny, graph, limits=()) for graph in (False, True)]
    case = MoeCase("bf16", "uniform", 64, "forward", None, "tiny")
    rows += [row(moe.test_fused_experts, replace(case, graph=graph)) for graph in (False, True)]
    results = {"benchmarks": [{"extra_info": r} for r in rows]}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.graph_table(results).splitlines()[2:]]
    assert [line[0] for line in lines] == ["attention decode8 forward", "norm swiglu 16", "moe forward uniform 64"]
    for line, launched, replayed in zip(lines, rows[::2], rows[1::2], strict=True):
        assert line[1:3] == [f"{r['ms']['sail']:.3f}" for r in (launched, replayed)]
    assert set(rows[-1]["ms"]) == {"sail", "grouped_mm"} and "peak_bytes" not in rows[-1]
    assert len(tables.infos(results, "norm")) == 1, "a replay is no row of the other tables"


def test_a_capture_is_warm_and_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a side stream first, then once under the capture; preparing stays outside of it."""
    said: list[str] = []

    @contextmanager
    def inside(name: str) -> Iterator[None]:
        said.append(f"<{name}")
        yield
        said.append(f"{name}>")

    stream = SimpleNamespace(wait_stream=lambda other: said.append("wait"))
    graph = SimpleNamespace(replay=lambda: said.append("replay"))
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _: inside("side"),
        "CUDAGraph": lambda: graph,
        "graph": lambda got: inside("graph" if got is graph else "another"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    steps = SimpleNamespace(prepare=lambda name: said.append("prepare"), run=lambda name: said.append("run"))
    replays = graphs.Replays(steps)
    for _ in range(2):
        replays.prepare("sail")
        replays.run("sail")
    warm = ["prepare", "run"] * graphs.WARM_UPS
    capture = ["wait", "<side", *warm, "side>", "wait", "prepare", "<graph", "run", "graph>"]
    assert said == [*capture, "replay", "replay"]


def test_slow_peers_and_the_compiled_one_are_for_one_size() -> None:
    """Of all rows at full size: the loop that trains, and two graphs of torch.compile, inference and training."""
    sizes = ((1024, "full"), (8192, "full"), (8192, "coarse"))
    cases = [
        MoeCase("bf16", routing, T, mode, None, size, "cuda")
        for routing in ("uniform", "zipf")
        for T, size in sizes
        for mode in ("forward", "train")
    ]
    compiled = [case.id for case in cases if "grouped_mm_compiled" in moe.peers_of(case)]
    assert compiled == ["bf16-uniform-full-T8192-forward", "bf16-uniform-full-T8192-train"]
    trains = [case.id for case in cases if case.mode == "train" and "stock_eager" in moe.peers_of(case)]
    assert trains == ["bf16-uniform-full-T8192-train"]


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
    assert "clusters are for compute capability 9.0" in failure(steps, "sail_cluster")


def test_a_peer_that_cannot_run_is_a_row_that_is_not_measured() -> None:
    steps = attention.CardSteps(bench_attention.Case((16, 16), 4, 2, 64, mode="forward"))
    runs, refused = usable(steps, ["sdpa", "sdpa_cudnn", "sdpa_flash"])
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
