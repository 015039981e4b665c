"""A step of training beside stock: three ways to compute the same loss and gradient; what is counted on the wire."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("deepspeed")
pytest.importorskip("easy_vqa")

from benchmarks import bench_training, loopback, report, stock, tables, targets, wire
from training.engines import deepspeed
from training.recipes import Recipe

RELATIVE = 2e-6  # what float32 steps of the same loss may differ by (training-engine-parity)


@pytest.fixture
def steps() -> Any:
    made = bench_training.TrainingSteps("tiny")
    made.recipe = replace(made.recipe, balance=0.0)  # which stock does not have
    yield made
    made.close()


def test_ours_and_stock_learn_the_same(steps: bench_training.TrainingSteps) -> None:
    """Loss, labels and gradient norm of packs with branches, of a question a row, of the same packs under a mask."""
    results = {}
    for name in bench_training.NAMES:
        steps.prepare(name)
        steps.run(name)
        results[name] = steps.result
        assert steps.loss(name) == steps.result.loss
    chosen = stock.implementations(steps.engines["stock"].objective)
    assert chosen == {"attention": "sdpa", "experts": "grouped_mm"}
    ours = results.pop("sail")
    assert ours.finite and ours.loss > 1 and ours.labels > 10 and ours.grad_norm > 0.1
    for theirs in results.values():
        assert theirs.labels == ours.labels
        assert theirs.loss == pytest.approx(ours.loss, rel=RELATIVE)
        assert theirs.grad_norm == pytest.approx(ours.grad_norm, rel=RELATIVE)
    work = {name: steps.work(name) for name in bench_training.NAMES}
    (pack,) = steps.packs
    questions = len(
        set(zip(pack.sample_BL.flatten().tolist(), pack.branch_BL.flatten().tolist(), strict=True)) - {(0, 0)}
    )
    questions -= int(pack.sample_BL.max())  # each sample's own tokens, of which nothing is learned
    assert work["sail"] == work["stock packed"] and work["sail"]["rows"] == 1
    assert work["sail padded"] == work["stock padded"]
    assert work["stock padded"]["rows"] == work["stock padded"]["tiles"] == questions > work["sail"]["tiles"]
    assert work["stock padded"]["positions"] > work["sail"]["positions"]


def test_a_mask_is_who_sees_whom(steps: bench_training.TrainingSteps) -> None:
    """Of every query as many keys as our packs' attention has."""
    (pack,) = steps.packs
    mask = stock.packed(pack).inputs["attention_mask"]
    assert mask.dtype == torch.bool and int(mask.sum()) == pack.pairs
    assert bool(mask.diagonal(dim1=-2, dim2=-1).all()), "a row of the mask that is empty gives NaN"


def test_options_are_those_of_one_engine() -> None:
    before = deepspeed.deepspeed_config
    with wire.with_options({"stage3_max_live_parameters": 0}):
        zero = deepspeed.deepspeed_config(Recipe(zero_stage=3), 2)["zero_optimization"]
    assert zero["stage"] == 3 and zero["stage3_max_live_parameters"] == 0
    assert deepspeed.deepspeed_config is before
    assert "stage3_max_live_parameters" not in before(Recipe(zero_stage=3), 2)["zero_optimization"]


def test_without_a_network_namespace_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert loopback.refused().startswith("no network namespace: ") and "setpriv" in loopback.refused()
    (tmp_path / "setpriv").write_text("#!/bin/sh\necho 'unshare: Operation not permitted' >&2\nexit 1\n")
    (tmp_path / "setpriv").chmod(0o755)
    assert loopback.refused() == "no network namespace: unshare: Operation not permitted"


def test_what_runs_alone_ends_with_who_started_it() -> None:
    """Of a count whose benchmark is killed no process goes on, however deep."""
    if reason := loopback.refused():
        pytest.skip(reason)
    command = [*loopback.ALONE, "sh", "-c", "(echo begun; sleep 20; echo finished) & wait"]
    code = f"import subprocess; subprocess.run({command!r})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None and started.stdout.readline() == "begun\n"
        started.kill()
        assert started.stdout.read() == "", "ends where the last process has ended"


def test_bytes_sent_are_counted() -> None:
    """A megabyte through a socket, in a namespace where nothing else is sent."""
    if reason := loopback.refused():
        pytest.skip(reason)
    code = """
import socket
from benchmarks.loopback import received
server = socket.create_server(("127.0.0.1", 0))
there = socket.create_connection(server.getsockname())
here, _ = server.accept()
before = received()
there.sendall(bytes(1_000_000))
there.shutdown(socket.SHUT_WR)
while here.recv(65536):
    pass
print(received() - before)
"""
    ran = subprocess.run([*loopback.ALONE, sys.executable, "-c", code], capture_output=True, text=True, cwd=wire.ROOT)
    assert 1_000_000 <= int(ran.stdout) < 1_100_000, ran.stderr


def results() -> dict[str, Any]:
    """A run made up."""
    work = {"rows": 2, "positions": 1280, "tiles": 8, "tokens": 1200, "labels": 300}
    ms = {"sail": 100.0, "sail padded": 200.0, "stock padded": 400.0, "stock packed": 150.0}
    step = {
        "family": "training",
        "kind": "train",
        "case": {"model": "the demo's model", "dtype": "float32"},
        "deepspeed": "0.19.8",
        "stock": {"attention": "sdpa", "experts": "grouped_mm"},
        "ms": ms,
        "speedup": {name: ms[name] / ms["sail"] for name in ms if name != "sail"},
        "work": dict.fromkeys(ms, work),
        "loss": dict.fromkeys(ms, 6.5),
        "peak_bytes": {name: int(2**20 * ms[name] / 100) for name in ms},
    }
    counted = {"ZeRO-2": {"1": 3e6, "4": 9e6}, "ZeRO-3": {"1": 4e6, "4": 16e6}}
    bytes_ = {"family": "training", "kind": "wire", "case": {}, "psi": 1e6, "wire": counted}
    return {"benchmarks": [{"extra_info": step}, {"extra_info": bytes_}]}


def test_tables() -> None:
    found = tables.training_table(results())
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.splitlines()]
    assert ["stock padded", "400", "3,000", "4.00", "4", "4.00", "6.50000", "2", "1,280", "8", "300"] in cells
    assert "a step of the demo's model" in cells[0] and "MFU" not in cells[0]
    assert ["ZeRO-3", "4.0", "4.00", "16.0", "16.00"] in cells
    assert "psi, 1 micro-batch " in found and "MB, 4 micro-batches" in found
    assert (
        "by DeepSpeed 0.19.8, float32, from the same weights" in found
        and "(sdpa attention, grouped_mm experts)" in found
    )
    without_wire = {"benchmarks": results()["benchmarks"][:1]}
    assert "wire" not in tables.training_table(without_wire)
    assert tables.training_table({"benchmarks": []}) == ""


def test_targets_are_of_the_same_content() -> None:
    assert [targets.training({"training": results()}, f"stock {kind}") for kind in ("padded", "packed")] == [4.0, 1.5]


def test_kept_results_have_one_loss_and_the_bytes_of_their_collectives() -> None:
    """Every way to train a step has the same loss; ZeRO sends a whole number of half weights, and some headers."""
    kept = report.kept(report.README_DEVICE)["training"]
    step, sent = (row["extra_info"] for row in kept["benchmarks"])
    losses = torch.tensor([step["loss"][name] for name in bench_training.NAMES])
    torch.testing.assert_close(losses, losses[:1].expand_as(losses))
    by_setting = {name: {int(g): found / sent["psi"] for g, found in of.items()} for name, of in sent["wire"].items()}
    formulas = {"offload": lambda g: 2 * g + 1, "owners": lambda g: 1.5 * g + 1, "use": lambda g: 4 * g}
    for end, formula in formulas.items():
        (found,) = (of for name, of in by_setting.items() if name.endswith(end))
        assert list(found) == [1, 4]
        assert all(formula(g) < psi < formula(g) + 0.25 * g for g, psi in found.items()), (end, found)
