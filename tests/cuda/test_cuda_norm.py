"""The norms' CUDA sources, host and kernels, on the emulator: every width and alignment that takes another path."""

from collections.abc import Iterator

import cuda_mutants
import pytest
import torch
from conftest import DEVICE
from cuda_mutants import Mutant
from emulated_library import emulated
from torch import Tensor

import sail_ops
from sail_ops import reference, testing

SOURCES = ("norm", "card")
DTYPES = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
# rows and columns; 4 to 32 threads a row share a warp, 512 are a block, and longer rows do not stay in registers
SHAPES = {
    "part_of_a_warp": (150, 64),
    "a_warp": (37, 512),
    "uneven_warps": (9, 1032),
    "several_warps": (19, 2048),
    "the_longest_kept": (3, 8192),
    "not_kept": (2, 8200),
    "several_blocks": (530, 64),
    "odd": (67, 77),
    "the_longest_odd_kept": (3, 2047),
    "odd_not_kept": (5, 2051),
}


@pytest.fixture(autouse=True)
def cuda() -> Iterator[None]:
    if DEVICE != "cpu":  # conftest has seen to it
        yield
        return
    with emulated(only=SOURCES):
        yield


def inputs(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> list[Tensor]:
    """x, residual, weight, bias."""
    x, residual = (testing.random(*shape, seed=i) + mean for i in range(2))
    weight, bias = 1 + testing.random(shape[-1], scale=0.2, seed=2), testing.random(shape[-1], seed=3)
    return [t.to(dtype).requires_grad_() for t in (x, residual, weight, bias)]


def check_all(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> None:
    """Outputs and every gradient; the sum's gradient reaches dx through grad_sum."""
    x, residual, weight, bias = inputs(shape, dtype, mean)
    testing.check_op(sail_ops.rms_norm, reference.rms_norm, x, weight)
    testing.check_op(sail_ops.add_rms_norm, reference.add_rms_norm, x, residual, weight)
    testing.check_op(sail_ops.layer_norm, reference.layer_norm, x, weight, bias)
    testing.check_op(sail_ops.add_layer_norm, reference.add_layer_norm, x, residual, weight, bias)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_accuracy(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check_all(shape, dtype)


def test_the_longest_row() -> None:
    check_all((1, 65536), torch.bfloat16)


@DTYPES
def test_rows_off_sixteen_bytes(dtype: torch.dtype) -> None:
    """A view that starts one element in: the same values as of the copy, by single elements."""
    x, residual, weight, bias = (t.detach() for t in inputs((9, 129), dtype))
    views = [t[:, 1:] for t in (x, residual)]
    parts = weight[1:].clone(), bias[1:].clone()
    copies = [t.clone() for t in views]
    for a, b in zip(sail_ops.add_layer_norm(*views, *parts), sail_ops.add_layer_norm(*copies, *parts), strict=True):
        torch.testing.assert_close(a, b)
    grads = [v.requires_grad_() for v in views]
    testing.check_op(sail_ops.add_layer_norm, reference.add_layer_norm, *grads, *parts)


@DTYPES
@pytest.mark.parametrize("columns", [64, 77, 8200])
def test_a_mean_far_from_zero(dtype: torch.dtype, columns: int) -> None:
    x, _, weight, bias = inputs((7, columns), dtype, mean=30)
    testing.check_op(sail_ops.layer_norm, reference.layer_norm, x, weight, bias)


@pytest.mark.parametrize("shape", [(150, 64), (19, 2048), (2, 8200), (67, 77)], ids=str)
def test_any_order_of_threads_gives_the_same_bits(shape: tuple[int, int]) -> None:
    """Every launch on the emulator has another one."""
    x, residual, weight, bias = inputs(shape, torch.bfloat16)
    testing.check_repeatable(sail_ops.add_rms_norm, x, residual, weight, times=4)
    testing.check_repeatable(sail_ops.add_layer_norm, x, residual, weight, bias, times=4)


@pytest.mark.parametrize("which", [(1, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 1, 1)])
def test_only_wanted_gradients(which: tuple[int, ...]) -> None:
    for columns in (64, 8200):
        args = [t.requires_grad_(bool(w)) for t, w in zip(inputs((9, columns), torch.float32), which, strict=True)]
        testing.check_op(sail_ops.layer_norm, reference.layer_norm, args[0], *args[2:])


def test_rows_at_one_distance() -> None:
    """As the docstrings have it: of a batch's first tokens they are not."""
    x, weight = testing.random(2, 9, 128), torch.ones(64)
    want = sail_ops.rms_norm(x[..., :64].contiguous(), weight)
    assert torch.equal(sail_ops.rms_norm(x[..., :64], weight), want)
    for op in (sail_ops.rms_norm, sail_ops.layer_norm):
        with pytest.raises(ValueError, match="x: got rows of uneven distance, .*, expected a contiguous tensor"):
            op(x[:, :7, :64], weight)


def test_more_rows_than_a_grid_has_blocks() -> None:
    with pytest.raises(ValueError, match="x: got shape .*, expected at most 2147483647 rows"):
        sail_ops.rms_norm(torch.ones(1, 1).expand(2**31, 1), torch.ones(1))


def check_short() -> None:
    for dtype in testing.DTYPES:
        check_all((150, 64), dtype)


def check_wide() -> None:
    check_all((19, 2048), torch.float32)
    for _ in range(4):
        check_any_order()


def check_any_order() -> None:
    x, residual, weight, bias = inputs((19, 2048), torch.bfloat16)
    testing.check_repeatable(sail_ops.add_layer_norm, x, residual, weight, bias, times=4)


def check_long() -> None:
    check_all((5, 8200), torch.float32)


NORM, ROWS = "kernels/norm.cuh", "kernels/rows.cuh"
MUTANTS = {
    "eps ignored": Mutant(ROWS, "static_cast<float>(D) + eps)", "static_cast<float>(D))", lambda: check_eps()),
    "residual ignored": Mutant(NORM, "x.v[i] = narrow<T>(v);", "narrow<T>(v);", check_short),
    "no mean of w g": Mutant(NORM, "wg_mean = sums[2] / D;", "wg_mean = 0.f;", check_short),
    "gradient of the sum ignored": Mutant(NORM, "if (a.grad_sum) load(", "if (!a.dx) load(", check_short),
    "a slot left out of dweight": Mutant(ROWS, "turn ? shared[c + j] + v[i][j] : v[i][j]", "v[i][j]", check_short),
    "rows of a warp not added": Mutant(ROWS, "o = blockDim.x; o < 32;", "o = blockDim.x; o < 16;", check_short),
    "no barrier in a row's sum": Mutant(ROWS, "  ptx::named_barrier(1 + threadIdx.y, blockDim.x);\n", "", check_wide),
    "one buffer for two sums": Mutant(ROWS, "  turn ^= 1;\n", "", check_wide),
    "last rows dropped": Mutant(
        ROWS, "row < rows; row += kSumGroups", "row < rows - 1; row += kSumGroups", check_short
    ),
    "a long row's first gradient only": Mutant(
        NORM, "const bool again = row > begin;", "const bool again = 0;", check_long
    ),
}


def check_eps() -> None:
    x, _, weight, _ = inputs((33, 256), torch.float32)
    testing.check_op(sail_ops.rms_norm, reference.rms_norm, (x.detach() * 1e-2).requires_grad_(), weight, 1e-5)


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return cuda_mutants.failures("test_cuda_norm")


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="mutants are emulated")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(failures: dict[str, str], name: str) -> None:
    assert failures[name] and not failures["none"]
