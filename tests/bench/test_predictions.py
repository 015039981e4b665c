"""predictions.json: decisions and kernels that exist, floors of the shapes, and a card's launches beside them."""

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark")
pytest.importorskip("transformers")

from benchmarks import card_page, predictions, report
from benchmarks.cases import SIZES
from benchmarks.kernels import Launch
from benchmarks.predictions import Prediction

ROOT = Path(__file__).resolve().parents[2]
IDS = [line.split(":")[0] for p in (ROOT / "docs/decisions").glob("*.md") for line in p.read_text().split("\n## ")[1:]]
IDS = [text.split("\n")[0] for text in IDS]
CUDA = "\n".join(p.read_text() for p in sorted((ROOT / "csrc" / "cuda").rglob("*.cu*")))
BF16 = 2
RATES = {"H100": (989e12, 3.35e12), "A100": (312e12, 2.039e12)}  # flop a second in bf16, bytes a second


def symbol(kernel: str, epilogue: str = "") -> str:
    return f"sail::cuda::sm90::{kernel}<__nv_bfloat16, sail::cuda::{epilogue}<true> >"


TRAIN = [
    Launch(symbol(*kernel.split()), float(i), i + ms)
    for i, (kernel, ms) in enumerate(
        [
            ("count_experts_kernel", 0.001),
            ("scan_blocks_kernel", 0.002),
            ("sort_rows_kernel", 0.003),
            ("rows_kernel GatedForwardEpilogue", 0.11),
            ("rows_kernel StoreRowsEpilogue", 0.12),
            ("combine_kernel", 0.13),
            ("rows_kernel GatedBackwardEpilogue", 0.14),
            ("wgrad_kernel StoreGradEpilogue", 0.15),
            ("wgrad_kernel StoreGradEpilogue", 0.16),
            ("rows_kernel StoreRowsEpilogue", 0.17),
            ("combine_kernel", 0.18),
        ]
    )
]


def row(T: int, mode: str, launches: list[Launch], **more: Any) -> dict[str, Any]:
    case = {"size": "full", "routing": "uniform", "T": T, "mode": mode, "D": 2048, "experts_hit": 128.0} | more
    return {"family": "moe", "case": case, "launches": {"sail": [list(launch) for launch in launches]}}


def cells(text: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    return {line[0] + " " + line[-1]: line[1:] for line in lines}


@pytest.mark.parametrize("prediction", predictions.predictions(), ids=lambda p: f"{p.device} {p.title} {p.source}")
def test_a_prediction_names_what_exists(prediction: Prediction) -> None:
    assert prediction.source in IDS
    for kernel in prediction.kernels:
        assert kernel.keys() <= {"name", "epilogue", "launch"}
        assert re.search(rf"__global__[^;{{}}]*?\b{kernel['name']}\(", CUDA), kernel
        assert "epilogue" not in kernel or re.search(rf"struct {kernel['epilogue']} ", CUDA), kernel
    low, high = prediction.bounds
    assert prediction.floor_ms < low <= high, "nothing is faster than its floor"
    assert prediction.implementation in ("sail", "sail_cluster")


def products(T: int, mode: str, card: str) -> dict[str, float]:
    """The least milliseconds of each product: its flop, or every operand and result once."""
    s, R = SIZES["full"], T * SIZES["full"].K
    x, rows, a, h = T * s.D, R * s.D, R * s.F, R * 2 * s.F
    up, down, half = 2 * s.F * s.D * s.E, s.F * s.D * s.E, 2 * R * s.D * s.F
    work = {
        "up": (2 * half, x + up + a + (h if mode == "train" else 0)),
        "down": (half, a + down + rows),
        "dA": (half, x + down + h + h + a),
        "dX": (2 * half, h + up + rows),
        "dW up": (2 * half, h + x + up),
        "dW down": (half, x + a + down),
    }
    flops, bandwidth = RATES[card]
    return {name: 1e3 * max(flop / flops, BF16 * elements / bandwidth) for name, (flop, elements) in work.items()}


def test_floors_of_the_expert_layer_follow_from_its_shapes() -> None:
    sums = {("all products", "forward"): 2, ("all products", "train"): 6, ("products with rows", "train"): 4}
    checked = 0
    for p in predictions.predictions():
        if p.family != "moe" or p.step in ("sort", "gather-sum"):
            continue
        least = products(p.case["T"], p.case["mode"], p.device)
        rows = ("up", "down", "dA", "dX", "dW up", "dW down")[: sums.get((p.step, p.case["mode"]))]
        want = least[p.step] if p.step in least else sum(least[name] for name in rows)
        assert p.floor_ms == pytest.approx(want, abs=1e-3), p.title
        checked += 1
    assert checked > 30


def test_a_cards_kernels_stand_beside_their_predictions() -> None:
    """Measured by hand: the second launch of a product that has the first one's name, sums, and a span."""
    rows = [row(1024, "train", []), row(8192, "train", TRAIN), row(8192, "forward", TRAIN[:6])]
    found = cells(predictions.prediction_table(predictions.of_card("NVIDIA H100 80GB HBM3"), rows))
    tile = "moe-cuda-sm90-tile"
    assert found[f"moe train T 8192: dX {tile}"][:4] == ["0.170", "0.74", "0.417", "tensor cores"]
    measured = {name: found[f"moe train T 8192: {name} {tile}"][0] for name in ("up", "down", "dA", "dW down", "dW up")}
    assert measured == {"up": "0.110", "down": "0.120", "dA": "0.140", "dW down": "0.150", "dW up": "0.160"}
    assert found[f"moe train T 8192: all products {tile}"][0] == "0.850"
    assert found[f"moe forward T 8192: all products {tile}"][:5] == [
        "0.230", "1.14", "0.647", "tensor cores and HBM", "0.20",
    ]  # fmt: skip
    assert found["moe forward T 8192: sort moe-cuda-counting-sort"][0] == "2.003", "first start to last end"
    assert found[f"moe train T 1024: up {tile}"][0] == "not measured"
    assert found["moe forward T 8192: all products by clusters moe-cuda-clusters"][0] == "not measured"
    assert found["attention S4096-forward: forward attention-cuda-prediction-sm90"][:2] == [
        "not measured",
        "1.04 to 1.22",
    ]


def test_what_is_no_row_of_the_case_is_not_taken() -> None:
    (up,) = [p for p in predictions.of_card("h100") if p.title == "moe train T 8192: up"]
    assert predictions.measured_ms(up, [row(8192, "train", TRAIN)]) == pytest.approx(0.11)
    for other in ({"routing": "zipf"}, {"size": "coarse"}, {"graph": True}):
        assert predictions.measured_ms(up, [row(8192, "train", TRAIN, **other)]) is None
    assert predictions.measured_ms(up, [row(8192, "train", TRAIN) | {"family": "step"}]) is None
    foreign = [Launch(launch.symbol.replace("sail::", "other::"), *launch[1:]) for launch in TRAIN]
    assert predictions.measured_ms(up, [row(8192, "train", foreign)]) is None
    for name in ("NVIDIA A100-SXM4-80GB", "cuda-nvidia-a100-sxm4-80gb"):
        assert {p.device for p in predictions.of_card(name)} == {"A100"}
    assert predictions.of_card("NVIDIA GH200") == predictions.of_card("cuda-nvidia-h200") == []


def test_the_page_says_what_nobody_has_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A card without results, and one whose run found no time for kernels."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "cuda-nvidia-h100-80gb-hbm3").mkdir()
    _, measured, waiting = report.page().split("\n## ")
    assert measured.startswith("cuda-nvidia-h100") and waiting.startswith("A100: no card has run it\n\n")
    for text, device in ((measured, "H100"), (waiting, "A100")):
        lines = cells(text[text.index("| kernels") :])
        assert len(lines) == len(predictions.of_card(device)) and {line[0] for line in lines.values()} == {
            "not measured"
        }
    assert len(card_page.without_results([])) == 4
