"""The sm_90a grouped GEMM on an emulated Hopper (tests/cuda_emulation/ptx_sm90.h): mbarriers, TMA, wgmma descriptors."""

import pytest
import torch

from tests import emulated
from tests.grouped_gemm import DTYPES, How, Problem, gated_backward, gated_forward, store_rows, wgrad

SOURCE = emulated.EMULATION / "grouped_gemm_sm90.cpp"

# Tiles are 128 x 256 with steps of 64 along K, four in shared memory.
PROBLEMS = {
    "one_tile": Problem((128,), 256, 64),
    "tails": Problem((70, 0, 133, 1), 264, 136),  # K and N end within a step and a tile, experts within a tile
    "ring": Problem((128, 30), 128, 392),  # seven steps: slots are used again
    "hot": Problem((0, 0, 300, 0), 64, 40),
    "gathered": Problem((5, 140, 0, 30), 72, 328, gather=True),
    "tail_rows": Problem((20, 3), 80, 32, tail=140),
    "pitch": Problem((33, 9), 72, 48, pitch=8),
    "no_rows": Problem((0, 0), 64, 64, tail=5),
    "many_experts": Problem(tuple(i % 3 for i in range(70)), 40, 24),
}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
problems = pytest.mark.parametrize("name", PROBLEMS)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> emulated.Library:
    return emulated.compile(SOURCE, tmp_path_factory.mktemp("emulated"))


@dtypes
@problems
@pytest.mark.parametrize("layout", ["nk", "kn"])
def test_store_rows(library: emulated.Library, dtype: torch.dtype, name: str, layout: str) -> None:
    store_rows(library, PROBLEMS[name], dtype, How(seed=1), layout)


@dtypes
@pytest.mark.parametrize("gather", [False, True], ids=["contiguous", "gathered"])
def test_odd_depth(library: emulated.Library, dtype: torch.dtype, gather: bool) -> None:
    """K need not be a multiple of anything where rows are padded to 16 bytes."""
    store_rows(library, Problem((9, 40), 64, 77, pitch=3, gather=gather), dtype, How(seed=2), "nk")


@dtypes
@pytest.mark.parametrize("name", ["tails", "gathered"])
@pytest.mark.parametrize("layout", ["nk", "kn"])
def test_bias_weight_parts(library: emulated.Library, dtype: torch.dtype, name: str, layout: str) -> None:
    parts = layout == "kn" and name == "tails"
    store_rows(library, PROBLEMS[name], dtype, How(), layout, bias=True, weight=True, two_parts=parts)


@dtypes
@problems
def test_gated_forward(library: emulated.Library, dtype: torch.dtype, name: str) -> None:
    gated_forward(library, PROBLEMS[name], dtype, How(seed=3))


@dtypes
@problems
def test_gated_backward(library: emulated.Library, dtype: torch.dtype, name: str) -> None:
    gated_backward(library, PROBLEMS[name], dtype, How(seed=4), weight=name != "ring")


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations(library: emulated.Library, activation: str) -> None:
    p = PROBLEMS["tails"]
    gated_forward(library, p, torch.bfloat16, How(), activation=activation, clamp=0.5, bias=True, want="a")
    gated_backward(library, p, torch.bfloat16, How(), activation=activation, clamp=0.5)


@dtypes
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "no_rows"])
@pytest.mark.parametrize("fp32", [False, True], ids=["same", "fp32"])
@pytest.mark.parametrize("gather", [(False, True), (True, False), (False, False)], ids=["b", "a", "none"])
def test_wgrad(
    library: emulated.Library, dtype: torch.dtype, name: str, fp32: bool, gather: tuple[bool, bool]
) -> None:
    two_parts = accumulate = gather[1] == fp32
    p = PROBLEMS[name]
    wgrad(library, p, dtype, How(seed=5), fp32=fp32, accumulate=accumulate, two_parts=two_parts, gather=gather)


@pytest.mark.parametrize("run", [store_rows, gated_forward, gated_backward, wgrad])
@pytest.mark.parametrize("name", ["tails", "gathered"])
def test_repeatable(library: emulated.Library, run, name: str) -> None:
    """Bitwise the same in any order of threads and blocks and on any number of blocks."""
    first = run(library, PROBLEMS[name], torch.bfloat16, How(seed=0, blocks=1))
    for seed in range(1, 5):
        assert torch.equal(run(library, PROBLEMS[name], torch.bfloat16, How(seed=seed, blocks=seed)), first)


@pytest.mark.parametrize(
    "p",
    [Problem((9, 40), 77, 64), Problem((9, 40), 64, 45), Problem((40,), 64, 64, shift=1)],
    ids=["columns", "depth", "address"],
)
def test_refuses_what_tma_cannot_read(library: emulated.Library, p: Problem) -> None:
    for run in (store_rows, gated_forward, gated_backward, wgrad):
        with pytest.raises(emulated.EmulationError, match="not for TMA"):
            run(library, p, torch.bfloat16, How())
