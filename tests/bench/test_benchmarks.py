"""The benchmarks' own arithmetic: routings, the peer we wrote ourselves, memory measurement, the report."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("transformers")

from benchmarks import bench_attention, cards, memory, peers, report, targets
from benchmarks.cases import MoeCase, cuda_cases, draw_routings, moe_cases
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


@pytest.mark.parametrize("name", ["sonicmoe", "sail_recomputed", "grouped"])
def test_what_is_no_peer_is_not_timed_as_ours(name: str) -> None:
    with pytest.raises(ValueError, match=f"got '{name}', expected a peer or one of sail, sail_recompute,"):
        Layer(TRAIN).prepare(name)


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


def test_pages_are_written_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "benchmarks" / "results" / report.README_DEVICE
    folder.mkdir(parents=True)
    families = report.HEADLINE_FAMILIES
    readme = tmp_path / "README.md"
    blocks = [
        f"{start.format(name)}\nold\n{end.format(name)}"
        for name in ("targets", "cards")
        for start, end in [report.MARKERS]
    ]
    readme.write_text("before\n" + "\n".join(blocks) + "\nafter\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks" / "results")
    for family in families:
        assert report.main(["--check"]) == 1
        assert f"{family}.json is missing" in capsys.readouterr().out
        (folder / f"{family}.json").write_text(json.dumps(results()))
    assert report.main(["--check"]) == 1 and "\nold\n" in readme.read_text()
    assert report.main([]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "\nold\n" not in text
    page = (tmp_path / "benchmarks" / "RESULTS.md").read_text()
    assert "2.00x to 4.00x" in page and f"## {report.README_DEVICE}" in page
    (tmp_path / "benchmarks" / "RESULTS.md").write_text(page.replace("2.00x", "3.00x"))
    assert report.main(["--check"]) == 1 and "out of date: benchmarks/RESULTS.md" in capsys.readouterr().out
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    card = folder.with_name("cuda-nvidia-h20")
    card.mkdir()
    info = results()["machine_info"] | {"card": {"name": "NVIDIA H20"}, "cuda": "13.0"}
    (card / "moe.json").write_text(json.dumps(results() | {"machine_info": info, "benchmarks": []}))
    assert report.main(["--check"]) == 1 and report.main([]) == 0 and report.main(["--check"]) == 0
    assert "| NVIDIA H20 | not measured" in readme.read_text()
    assert "## cuda-nvidia-h20" in (tmp_path / "benchmarks" / "RESULTS.md").read_text()
    another = folder.with_name("cpu-of-another-kind")
    another.mkdir()
    (another / "moe.json").write_text(json.dumps(results()))
    assert report.main([]) == 0
    page = (tmp_path / "benchmarks" / "RESULTS.md").read_text()
    assert page.index("## cpu-amd") < page.index("## cpu-of-another-kind") < page.index("## cuda-nvidia-h20")
    for name in ("targets", "cards"):
        readme.write_text(text.replace(report.MARKERS[0].format(name), ""))
        assert report.main(["--check"]) == 1 and f"bench:{name}:start" in capsys.readouterr().out


def test_every_target_is_held_against_the_kept_results() -> None:
    kept = report.kept(report.README_DEVICE)
    assert kept.keys() >= set(report.HEADLINE_FAMILIES)
    text = targets.target_table(kept)
    assert len(text.splitlines()) == 2 + len(targets.TARGETS) and "not measured" not in text
    for info in (row["extra_info"] for row in kept["step"]["benchmarks"]):
        info["speedup"]["transformers"], info["peak_bytes"]["sail"] = 1.49, info["peak_bytes"]["transformers"] + 1
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in targets.target_table(kept).splitlines()]
    layer = [row[2:] for row in cells if row[0].startswith("whole decoder layer")]
    assert layer == [["1.49", "no"], ["1.00", "no"]]


def card_results(name: str) -> dict[str, Any]:
    """A card's results made up, by family: ours takes 2 ms, the n-th peer n + 1 times that; other cases 9 ms."""
    found = {}
    for headline in cards.HEADLINES:
        rows = []
        for case, ours in ((headline.case, 2.0), (dict.fromkeys(headline.case, "another"), 9.0)):
            speedup = {peer: n + 2.0 for n, peer in enumerate(headline.peers)}
            info = {"family": headline.family, "kind": "train", "case": case, "ms": {"sail": ours}, "speedup": speedup}
            rows.append({"extra_info": info})
        found[headline.family] = results() | {"benchmarks": rows, "machine_info": {"card": {"name": name}}}
    return found


def test_table_of_cards() -> None:
    """Rows that wait, a card of which a family is missing, one that is not among the named, a peer that did not run."""
    h100, other = card_results("NVIDIA H100 80GB HBM3"), card_results("NVIDIA L40S")
    del h100["loss"], other["moe"]["benchmarks"][0]["extra_info"]["speedup"]["liger"]
    text = cards.card_table({"cuda-nvidia-l40s": other, "cuda-nvidia-h100-80gb-hbm3": h100})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert [row[0] for row in rows] == ["A100", "NVIDIA H100 80GB HBM3", "H20", "NVIDIA L40S"]
    assert set(rows[0][1:]) == set(rows[2][1:]) == {"not measured"}
    figures = "2.00 ms; 2.00x grouped_mm, 3.00x Liger", "2.00 ms; 2.00x flash, 3.00x cuDNN"
    assert tuple(rows[1][1:3]) == figures and rows[1][4] == "not measured" and rows[1][-1] == "0123456789, 2026-01-01"
    assert rows[3][1] == "2.00 ms; 2.00x grouped_mm, Liger not measured"


def test_headlines_are_cases_that_a_card_runs() -> None:
    """A case that no benchmark has any more would be "not measured" for ever."""
    from benchmarks import bench_attention_cuda, bench_loss, bench_moe_cuda, bench_norm_cuda, bench_step_cuda

    wanted = {headline.family: headline for headline in cards.HEADLINES}
    moe = [case for case in cuda_cases() if vars(case).items() >= wanted["moe"].case.items()]
    assert len(moe) == 1 and set(wanted["moe"].peers) <= set(bench_moe_cuda.peers_of(moe[0]))
    case = bench_attention_cuda.CASES[wanted["attention"].case["name"]]
    assert (case.causal, case.lengths) == (True, (4096,) * 4)
    assert set(wanted["attention"].peers) <= set(bench_attention_cuda.peers_of(case))
    assert wanted["step"].case["T"] in bench_step_cuda.TOKENS
    op, D = wanted["norm"].case["op"], wanted["norm"].case["D"]
    assert (op, D) in [(op, shape[1]) for op, shape in bench_norm_cuda.CASES]
    assert set(wanted["norm"].peers) <= {*bench_norm_cuda.peers_of(op), "liger"}
    assert set(wanted["loss"].peers) <= {*bench_loss.PEERS, "liger"}
