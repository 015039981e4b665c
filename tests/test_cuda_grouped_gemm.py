"""The sm_80 grouped GEMM on an emulated GPU (tests/cuda_emulation): every problem, layout, tile shape and epilogue."""

import pytest
import torch

from tests import emulated
from tests.grouped_gemm import DTYPES, PROBLEMS, How, gated_backward, gated_forward, store_rows, wgrad

SOURCE = emulated.EMULATION / "grouped_gemm_sm80.cpp"
SHAPES = {"small": 0, "medium": 1, "large": 2}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
problems = pytest.mark.parametrize("name", PROBLEMS)
shapes = pytest.mark.parametrize("tiles", SHAPES.values(), ids=SHAPES)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> emulated.Library:
    return emulated.compile(SOURCE, tmp_path_factory.mktemp("emulated"))


@dtypes
@problems
@shapes
@pytest.mark.parametrize("layout", ["nk", "kn"])
def test_store_rows(library: emulated.Library, dtype: torch.dtype, name: str, tiles: int, layout: str) -> None:
    store_rows(library, PROBLEMS[name], dtype, How(tiles, seed=tiles), layout)


@dtypes
@pytest.mark.parametrize("name", ["tails", "odd"])
@pytest.mark.parametrize("layout", ["nk", "kn"])
@pytest.mark.parametrize("two_parts", [False, True], ids=["one_part", "two_parts"])
def test_bias_weight_parts(
    library: emulated.Library, dtype: torch.dtype, name: str, layout: str, two_parts: bool
) -> None:
    store_rows(library, PROBLEMS[name], dtype, How(), layout, bias=True, weight=True, two_parts=two_parts)


@dtypes
@problems
@shapes
def test_gated_forward(library: emulated.Library, dtype: torch.dtype, name: str, tiles: int) -> None:
    gated_forward(library, PROBLEMS[name], dtype, How(tiles, seed=tiles))


@dtypes
@pytest.mark.parametrize("name", ["tails", "odd"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("clamp", [None, 0.5])
def test_activations(
    library: emulated.Library, dtype: torch.dtype, name: str, activation: str, clamp: float | None
) -> None:
    p = PROBLEMS[name]
    gated_forward(library, p, dtype, How(), activation=activation, clamp=clamp, bias=True)
    gated_backward(library, p, dtype, How(), activation=activation, clamp=clamp)


@pytest.mark.parametrize("want", ["h", "a"])
def test_only_one_result(library: emulated.Library, want: str) -> None:
    gated_forward(library, PROBLEMS["tails"], torch.bfloat16, How(), want=want)


@dtypes
@problems
@shapes
def test_gated_backward(library: emulated.Library, dtype: torch.dtype, name: str, tiles: int) -> None:
    gated_backward(library, PROBLEMS[name], dtype, How(tiles, seed=tiles), weight=name != "even")


@dtypes
@problems
@pytest.mark.parametrize("fp32", [False, True], ids=["same", "fp32"])
@pytest.mark.parametrize("accumulate", [False, True], ids=["set", "add"])
def test_wgrad(library: emulated.Library, dtype: torch.dtype, name: str, fp32: bool, accumulate: bool) -> None:
    p = PROBLEMS[name]
    for two_parts, gather in ((True, (False, True)), (False, (True, False))):
        wgrad(library, p, dtype, How(), fp32=fp32, accumulate=accumulate, two_parts=two_parts, gather=gather)


@pytest.mark.parametrize("run", [store_rows, gated_forward, gated_backward, wgrad])
@pytest.mark.parametrize("name", ["tails", "odd"])
def test_repeatable(library: emulated.Library, run, name: str) -> None:
    """Bitwise the same in any order of threads and blocks and on any number of blocks."""
    first = run(library, PROBLEMS[name], torch.bfloat16, How(seed=0, blocks=1))
    for seed in range(1, 8):
        assert torch.equal(run(library, PROBLEMS[name], torch.bfloat16, How(seed=seed, blocks=seed)), first)
