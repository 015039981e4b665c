"""The benchmarks' own arithmetic: routings, the peer we wrote ourselves, memory measurement, the report."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/ is run in place, never installed

from benchmarks import bench_attention, memory, peers, report
from benchmarks.cases import MoeCase, draw_routings, moe_cases
from benchmarks.layer import Layer
from sail_ops import reference
from sail_ops.testing import assert_accurate, check_op, random

TRAIN = MoeCase("fp32", "uniform", 64, "train", "in_place", "tiny")


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
def test_routings_take_distinct_experts(routing: str) -> None:
    case = MoeCase("bf16", routing, 512, "forward")
    (ids_TK,) = draw_routings(case, 1)
    assert ids_TK.shape == (512, 8) and all(len(set(ids)) == 8 for ids in ids_TK.tolist())
    counts = torch.bincount(ids_TK.flatten(), minlength=128).sort(descending=True).values
    if routing == "zipf":  # the first expert leads by far, the last tenth of the experts gets next to nothing
        assert counts[0] > 5 * counts[32] and counts[-12:].sum() < 0.03 * counts.sum()
    else:
        assert counts[0] < 64 and counts[-1] > 16  # 32 on average, 5.5 standard deviation


def test_single_tokens_rotate_through_all_experts() -> None:
    routings = draw_routings(MoeCase("bf16", "uniform", 1, "forward"), 16)
    assert sorted(torch.cat(routings).flatten().tolist()) == list(range(128))


def test_work_of_a_case() -> None:
    """By hand, for two tokens through Qwen3-30B-A3B's layer."""
    forward, expert = MoeCase("bf16", "uniform", 2, "forward"), 3 * 768 * 2048 * 2
    assert forward.flops == 2 * 2 * 8 * 3 * 768 * 2048 and forward.weight_traffic(16) == (16 * expert, 0)
    fresh = MoeCase("bf16", "uniform", 2, "train", "fresh")
    assert fresh.flops == 3 * forward.flops and fresh.weight_traffic(16) == (32 * expert, 128 * expert)
    in_place = MoeCase("bf16", "uniform", 2, "train", "in_place")
    assert in_place.weight_traffic(16) == (48 * expert, 16 * expert)


@pytest.mark.parametrize("name", ["sail", "grouped_mm", "eager_unbind", "stock_eager"])
def test_every_peer_computes_the_layer(name: str) -> None:
    layer = Layer(TRAIN)
    gate_up, down = (w.detach() for w in layer.weights)
    ids = layer.ids[0]

    def of(function: Any) -> Any:
        return lambda x, gate_up, down, weights: function(x, gate_up, down, ids, weights)

    def peer(x: Any, gate_up: Any, down: Any, ids: Any, weights: Any) -> Any:
        # transformers' module takes parameters only
        return peers.build(name, *(torch.nn.Parameter(w) for w in (gate_up, down)))(x, ids, weights)

    x, weights = random(64, 64, seed=3).requires_grad_(), layer.routing_TK.detach().requires_grad_()
    check_op(of(peer), of(reference.fused_experts), x, gate_up, down, weights)


@pytest.mark.parametrize("case", bench_attention.CASES.values(), ids=bench_attention.CASES.keys())
def test_every_attention_peer_computes_the_case(case: bench_attention.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAIL_BENCH_SIZE", "tiny")
    # compiled code is `make bench`'s, and takes minutes
    monkeypatch.setattr(bench_attention, "compiled_attention", reference.attention)
    steps = bench_attention.AttentionSteps(bench_attention.sized(case)._replace(dtype="fp32"))
    results = {}
    for name in ("sail", *bench_attention.peers_of(case)):
        steps.prepare(name)
        steps.run(name)
        results[name] = [steps.forward(name), *(t.grad for t in steps.inputs if t.requires_grad)]
    for theirs in results.values():
        torch.testing.assert_close(theirs, results["sail"], rtol=1e-4, atol=1e-4)


def test_only_short_batches_have_a_peer_with_all_scores() -> None:
    with_scores = [name for name, case in bench_attention.CASES.items() if "compiled" in bench_attention.peers_of(case)]
    assert with_scores == ["S1024-forward", "S1024-train", "S1024-train-fp32", "vision-train"]


def test_work_of_an_attention_case() -> None:
    """By hand, for two heads of 64: causal sequences of 2 and 3 tokens, one decode step of 2 against 5."""
    case = bench_attention.Case((2, 3), 2, 1, 64, mode="forward")
    assert bench_attention.AttentionSteps(case).flops == 4 * (3 + 6) * 2 * 64
    decode = case._replace(lengths=(5,), queries=2)
    assert bench_attention.AttentionSteps(decode).flops == 4 * (4 + 5) * 2 * 64


def test_in_place_gradients_accumulate_alike() -> None:
    """Ours into main_grads and theirs into .grad: the same dW, added once per step."""
    layer, sums = Layer(TRAIN), {}
    for name in ("sail", "grouped_mm"):
        for _ in range(2):
            layer.prepare(name)
            layer.run(name)
        assert (layer.weights[0].grad is None) == (name == "sail")
        sums[name] = [buffer.clone() for buffer in layer.buffers[torch.float32]]
        for buffer in layer.buffers[torch.float32]:
            buffer.zero_()
    wide = [t.detach().double().requires_grad_() for t in (layer.x_TD, *layer.weights, layer.routing_TK)]
    y = reference.fused_experts(*wide[:3], layer.ids[0], wide[3])
    exact = torch.autograd.grad(y, wide[1:3], 2 * layer.grad_TD.double())
    for ours, ref, theirs in zip(sums["sail"], exact, sums["grouped_mm"], strict=True):
        assert_accurate(ours.flatten(), ref.flatten(), theirs.flatten())


def test_saved_bytes() -> None:
    """Ours keeps what the design allows; what the loop keeps includes the gathered rows and the activations."""
    layer = Layer(TRAIN)
    allowed, _ = memory.formula(TRAIN, recompute=False)
    routed = TRAIN.T * TRAIN.sizes.K
    assert TRAIN.T * 64 * 4 + routed * 2 * 32 * 4 <= memory.saved_bytes(layer, "sail") <= allowed
    assert memory.saved_bytes(layer, "sail_recompute") <= memory.formula(TRAIN, recompute=True)[0]
    assert memory.saved_bytes(layer, "grouped_mm") > 2 * allowed


def results() -> dict[str, Any]:
    """A run made up of every case: ours takes 1 ms, grouped_mm 2 to 4, the loop 5."""
    rows = []
    for n, case in enumerate(moe_cases()):
        times = {"sail": 1.0, "grouped_mm": 2.0 + n % 3, "eager_unbind": 5.0}
        info = {"family": "moe", "kind": case.mode, "case": vars(case) | vars(case.sizes), "ms": times}
        info |= {"speedup": {name: t for name, t in times.items() if name != "sail"}}
        info |= dict.fromkeys(("gflops", "weights_gb_s", "of_dense_mm", "of_read_bandwidth", "of_limit"), 0.5)
        rows.append({"extra_info": info})
    limits = {"dense_gflops": {"bf16": 400.0, "fp32": 200.0}, "read_gb_s": 30.0, "write_gb_s": 20.0}
    machine = {"cpu": {"brand_raw": "CPU"}, "isa": "avx2", "threads": 2, "versions": {"torch": "2"}, "size": "full"}
    commit = {"id": "0123456789abcdef", "dirty": False}
    return {
        "benchmarks": rows,
        "machine_info": {**machine, "limits": limits},
        "commit_info": commit,
        "datetime": "2026-01-01T00:00:00",
    }


def test_report(tmp_path: Path) -> None:
    text = report.summary(results())
    assert text.count("| bf16 zipf") == 10 and text.count("| fp32 uniform") == 10
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["grouped_mm", "fresh", "2.00x to 4.00x", "in part"] in cells
    assert ["grouped_mm", "its fastest of these, ours added in place", "2.00x", "no"] in cells
    assert ["eager + unbind", "added in place", "5.00x", "yes"] in cells
    assert report.chart(results(), tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_readme_blocks_are_replaced_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "benchmarks" / "results" / report.README_DEVICE
    folder.mkdir(parents=True)
    families = ("moe", *report.TABLES)
    readme = tmp_path / "README.md"
    blocks = [
        f"{start.format(family)}\nold\n{end.format(family)}" for family in families for start, end in [report.MARKERS]
    ]
    readme.write_text("before\n" + "\n".join(blocks) + "\nafter\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks" / "results")
    for family in families:
        assert report.main(["--check"]) == 1
        assert f"{family}.json is missing" in capsys.readouterr().out
        (folder / f"{family}.json").write_text(json.dumps(results()))
    assert report.main(["--check"]) == 1 and "old" in readme.read_text()
    assert report.main([]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "2.00x to 4.00x" in text
    assert report.main(["--check"]) == 0
    readme.write_text(text.replace(report.MARKERS[0].format("norm"), ""))
    assert report.main(["--check"]) == 1 and "bench:norm:start" in capsys.readouterr().out
