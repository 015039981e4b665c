"""Bad input of the expert layer and of grouped_mm: a ValueError names the operator, the argument and what is wanted."""

import pytest
import torch
from expert_layer import layer, offsets
from torch import Tensor

import sail_ops
from sail_ops.testing import ExpertsCase

T, D, F, E, K = 6, 8, 4, 3, 2
X, GATE_UP, DOWN, IDS, WEIGHTS = (t.detach() for t in layer(ExpertsCase(T, D, F, E, K)))
BIASES = torch.zeros(E, 2 * F), torch.zeros(E, D)
W = GATE_UP.transpose(1, 2)
ENDS = offsets(2, 1, 2)
HERE = X.device


def fused(**changed) -> Tensor:
    given = {"x_TD": X, "gate_up_E2FD": GATE_UP, "down_EDF": DOWN, "ids_TK": IDS, "weights_TK": WEIGHTS}
    return sail_ops.fused_experts(**(given | changed))


def grouped(**changed) -> Tensor:
    given = {"x_RD": X, "gate_up_E2FD": GATE_UP, "down_EDF": DOWN, "offsets_E": ENDS, "weights_R": WEIGHTS[:, 0]}
    return sail_ops.grouped_experts(**(given | changed))


def mm(**changed) -> Tensor:
    return sail_ops.grouped_mm(**({"x_RK": X, "w_EKN": W, "offsets_E": ENDS} | changed))


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


EXPERTS = {
    "x_rank": ({"x": X[None]}, r"x: got shape \[1, 6, 8\], expected 2 dimensions"),
    "x_dtype": ({"x": X.double()}, "x: got .*, expected float32, bfloat16 or float16"),
    "x_strides": ({"x": X.t().contiguous().t()}, "x: got rows of stride 6, expected rows of stride 1"),
    "x_width": ({"x": X[:, :7]}, r"down: got shape \[3, 8, 4\], expected shape \[3, 7, 4\]"),
    "x_empty": ({"x": X[:, :0]}, "x: got D = 0, expected D >= 1"),
    "down_rank": ({"down_EDF": DOWN[0]}, r"down: got shape \[8, 4\], expected 3 dimensions"),
    "down_dtype": ({"down_EDF": DOWN.half()}, "down: got float16, expected float32"),
    "down_strides": ({"down_EDF": DOWN.transpose(1, 2).contiguous().transpose(1, 2)}, "down: got a non-contiguous"),
    "no_experts": ({"down_EDF": DOWN[:0], "gate_up_E2FD": GATE_UP[:0]}, "down: got E = 0, expected E >= 1"),
    "no_width": ({"down_EDF": DOWN[..., :0], "gate_up_E2FD": GATE_UP[:, :0]}, "down: got F = 0, expected F >= 1"),
    "gate_up_shape": ({"gate_up_E2FD": GATE_UP[:, 1:]}, r"gate_up: got shape \[3, 7, 8\], expected shape \[3, 8, 8\]"),
    "gate_up_rank": ({"gate_up_E2FD": GATE_UP[0]}, r"gate_up: got shape \[8, 8\], expected shape \[3, 8, 8\]"),
    "gate_up_dtype": ({"gate_up_E2FD": GATE_UP.bfloat16()}, "gate_up: got bfloat16, expected float32"),
    "gate_up_strides": ({"gate_up_E2FD": empty(E, 2 * F, 9)[..., :D]}, "gate_up: got a non-contiguous"),
    "gate_shape": (
        {"gate_up_E2FD": (GATE_UP, GATE_UP[:, F:])},
        r"gate: got shape \[3, 8, 8\], expected shape \[3, 4, 8\]",
    ),
    "up_shape": ({"gate_up_E2FD": (empty(E, F, D), GATE_UP)}, r"up: got shape \[3, 8, 8\], expected shape \[3, 4, 8\]"),
    "up_dtype": ({"gate_up_E2FD": (empty(E, F, D), empty(E, F, D).half())}, "up: got float16, expected float32"),
    "bias_1_shape": ({"biases": (BIASES[1], BIASES[1][:2])}, r"down_bias: got shape \[2, 8\], expected shape \[3, 8\]"),
    "bias_2_dtype": ({"biases": (BIASES[0].half(), BIASES[1])}, "gate_up_bias: got float16, expected float32"),
    "activation": ({"activation": "relu"}, "activation: got 'relu', expected one of silu, gelu, gelu_tanh"),
    "clamp_zero": ({"clamp": 0.0}, "clamp: got 0.0.*, expected a positive number"),
    "clamp_nan": ({"clamp": float("nan")}, "clamp: got nan, expected a positive number"),
}
FUSED = {
    "ids_rank": ({"ids_TK": IDS[:, 0]}, r"ids: got shape \[6\], expected 2 dimensions"),
    "ids_rows": ({"ids_TK": IDS[1:]}, r"ids: got shape \[5, 2\], expected shape \[6, 2\]"),
    "ids_dtype": ({"ids_TK": IDS.float()}, "ids: got float32, expected int32 or int64"),
    "no_choice": ({"ids_TK": IDS[:, :0], "weights_TK": WEIGHTS[:, :0]}, "ids: got K = 0, expected K >= 1"),
    "weights_shape": ({"weights_TK": WEIGHTS[:, :1]}, r"weights: got shape \[6, 1\], expected shape \[6, 2\]"),
    "weights_dtype": ({"weights_TK": WEIGHTS.half()}, "weights: got float16, expected float32 or x's dtype, float32"),
    "device": (
        {"ids_TK": IDS.to("meta")},
        f"got a tensor on meta, expected {HERE}|got a tensor on {HERE}, expected meta",
    ),
    "weight_device": ({"down_EDF": DOWN.to("meta")}, f"down: got a tensor on meta, expected {HERE}"),
}
GROUPED = {
    "offsets_dtype": ({"offsets_E": ENDS.long()}, "offsets: got int64, expected int32"),
    "offsets_shape": ({"offsets_E": ENDS[1:]}, r"offsets: got shape \[2\], expected shape \[3\]"),
    "offsets_fall": (
        {"offsets_E": torch.tensor([3, 2, 6]).int()},
        "offsets: got 2 at 1 after 3, expected ends that",
    ),
    "offsets_negative": ({"offsets_E": torch.tensor([-1, 2, 6]).int()}, "offsets: got -1 at 0 after 0"),
    "offsets_past": ({"offsets_E": offsets(2, 3, 2)}, "offsets: got 7 at 2 after 5, expected .* within 6 rows"),
    "weights_shape": ({"weights_R": WEIGHTS[:5, 0]}, r"weights: got shape \[5\], expected shape \[6\]"),
    "weights_dtype": ({"weights_R": WEIGHTS[:, 0].half()}, "weights: got float16, expected float32 or x's dtype"),
    "device": ({"offsets_E": ENDS.to("meta")}, f"got a tensor on meta, expected {HERE}"),
}
MM = {
    "x_rank": ({"x_RK": X[0]}, r"x: got shape \[8\], expected 2 dimensions"),
    "w_rank": ({"w_EKN": W[0]}, r"w: got shape \[8, 8\], expected 3 dimensions"),
    "w_dtype": ({"w_EKN": W.half()}, "w: got float16, expected float32"),
    "x_dtype": ({"x_RK": X.int()}, "x: got int32, expected float32, bfloat16 or float16"),
    "sizes": ({"w_EKN": W[:, :7]}, r"w: got shape \[3, 7, 8\], expected \[E, 8, n\]"),
    "no_columns": ({"w_EKN": W[..., :0]}, "w: got n = 0, expected n >= 1"),
    "no_sum": ({"w_EKN": W[:, :0], "x_RK": X[:, :0]}, "x: got k = 0, expected k >= 1"),
    "no_experts": ({"w_EKN": W[:0], "offsets_E": ENDS[:0]}, "w: got E = 0, expected E >= 1"),
    "w_strides": (
        {"w_EKN": empty(E, 16, 16)[:, ::2, ::2]},
        "w: got strides 32, 2, expected stride 1 along k or",
    ),
    "x_strides": ({"x_RK": X.t().contiguous().t()}, "x: got rows of stride 6, expected rows of stride 1"),
    "offsets_dtype": ({"offsets_E": ENDS.long()}, "offsets: got int64, expected int32"),
    "offsets_fall": ({"offsets_E": torch.tensor([3, 2, 6]).int()}, "offsets: got 2 at 1 after 3"),
    "offsets_past": ({"offsets_E": offsets(2, 3, 2)}, "offsets: got 7 at 2 after 5"),
    "device": ({"w_EKN": W.to("meta")}, f"w: got a tensor on meta, expected {HERE}"),
}


@pytest.mark.parametrize("changed, message", EXPERTS.values(), ids=EXPERTS.keys())
def test_both_expert_layers(changed: dict, message: str) -> None:
    for op, x in ((fused, "x_TD"), (grouped, "x_RD")):
        with pytest.raises(ValueError, match=rf"sail_ops\.{op.__name__}_experts: {message}"):
            op(**{x if k == "x" else k: v for k, v in changed.items()})


@pytest.mark.parametrize("changed, message", FUSED.values(), ids=FUSED.keys())
def test_fused_experts(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"sail_ops\.fused_experts: .*{message}"):
        fused(**changed)


@pytest.mark.parametrize("changed, message", GROUPED.values(), ids=GROUPED.keys())
def test_grouped_experts(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"sail_ops\.grouped_experts: .*{message}"):
        grouped(**changed)


@pytest.mark.parametrize("changed, message", MM.values(), ids=MM.keys())
def test_grouped_mm(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"sail_ops\.grouped_mm: {message}"):
        mm(**changed)


MAIN_GRADS = {
    "count": ([GATE_UP], "main_grads: got 1 buffers, expected "),
    "shape": ([GATE_UP[:, 1:], DOWN], r"main_grads: got shape \[3, 7, 8\], expected the weight's shape \[3, 8, 8\]"),
    "rank": ([GATE_UP[0], DOWN], r"main_grads: got shape \[8, 8\], expected the weight's shape"),
    "dtype": ([GATE_UP, DOWN.half()], "main_grads: got float16, expected float32 or the weight's dtype"),
    "strides": ([GATE_UP, DOWN.transpose(1, 2).contiguous().transpose(1, 2)], "main_grads: got a non-contiguous"),
}


@pytest.mark.parametrize("buffers, message", MAIN_GRADS.values(), ids=MAIN_GRADS.keys())
@pytest.mark.parametrize("op", [fused, grouped], ids=["fused", "grouped"])
def test_main_grads(op, buffers: list[Tensor], message: str) -> None:
    gate_up, down = (t.clone().requires_grad_() for t in (GATE_UP, DOWN))
    with pytest.raises(ValueError, match=rf"sail_ops\.{op.__name__}_experts.*: {message}"):
        op(gate_up_E2FD=gate_up, down_EDF=down, main_grads=tuple(buffers)).sum().backward()


def test_main_grads_of_a_pair() -> None:
    pair = tuple(t.contiguous().requires_grad_() for t in GATE_UP.chunk(2, 1))
    with pytest.raises(ValueError, match=r"main_grads: got 2 buffers, expected \(gate, up, down\)"):
        fused(gate_up_E2FD=pair, main_grads=(GATE_UP, DOWN))


def test_more_routed_rows_than_an_int32_counts() -> None:
    """Views of a few elements: reading them as what they claim to be would take 34 GB."""
    rows, k = 2**20, 2**12
    with pytest.raises(ValueError, match="fused_experts: ids: got 4294967296 routed rows, expected at most 2147483647"):
        fused(
            x_TD=X[:1].expand(rows, D),
            ids_TK=torch.zeros(1, 1, dtype=torch.int64).expand(rows, k),
            weights_TK=torch.ones(1, 1).expand(rows, k),
        )
    rows = 2**31
    x = X[:1].expand(rows, D)
    for call in (lambda: grouped(x_RD=x, weights_R=None), lambda: mm(x_RK=x)):
        with pytest.raises(ValueError, match="grouped_.*: x: got 2147483648 rows, expected at most 2147483647"):
            call()
