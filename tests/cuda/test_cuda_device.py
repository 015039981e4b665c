"""What only a card can show: CUDA graphs, streams, no synchronization, memory within the design. `make gpu-check`."""

import os
from collections.abc import Callable

import pytest
import torch
from expert_layer import Layer, detached, layer, offsets
from torch import Tensor

import sail_ops
from sail_ops import reference, testing
from sail_ops.testing import ExpertsCase

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
CASE = ExpertsCase(199, 256, 192, 16, 4)
# Two row tiles of 128 an expert and more, even and odd numbers of them and of column tiles: what goes in clusters too
SEVERAL_TILES = [
    ExpertsCase(1024, 512, 384, 8, 2),
    ExpertsCase(700, 264, 136, 2, 1),
    ExpertsCase(300, 64, 520, 1, 1),
    ExpertsCase(1100, 128, 72, 4, 1, "hot"),
]
several_tiles = pytest.mark.parametrize("case", SEVERAL_TILES, ids=lambda case: f"T{case.T}")
NEEDS = 15  # x, both weights, routing weights
ops = torch.ops.sail_ops


@pytest.fixture(autouse=True)
def values_unchecked() -> None:
    """What these tests are about is the default; tests/conftest.py turns the checks on before the library reads it."""
    if os.environ.get("SAIL_OPS_CHECK") == "1":
        pytest.skip("value checks wait for the device: run this file without SAIL_TEST_DEVICE")


def on_card(case: ExpertsCase = CASE, seed: int = 0) -> Layer:
    return Layer(*(t.cuda() for t in detached(*layer(case, torch.bfloat16, seed=seed))))


def step(args: Layer) -> list[Tensor]:
    """Output and gradients of one training step, through the operators."""
    x, gate_up, down, ids, weights = args
    y, h = ops.fused_experts(x, gate_up, None, down, ids, weights, None, None, 0, None, True)
    grads = ops.fused_experts_backward(
        y, x, gate_up, None, down, ids, weights, h, None, None, 0, None, NEEDS, None, None, None
    )
    routing = sail_ops.route_topk(x[:, :64], 4, renormalize=True)
    experts = [y, *grads[:2], grads[3], grads[4], *routing]
    return [*experts, *attention_step(x), *norm_step(x), *loss_step(x, gate_up, ids)]


def attention_step(x: Tensor) -> list[Tensor]:
    """A batch, a pack, and few queries, which are split over the keys."""
    q = x.view(1, -1, 4, 64)
    kv = q[:, :, :2], q[:, :, 2:]
    cu = torch.arange(3, device=x.device).mul(100).clamp(max=len(x)).int()
    pack = q[0], kv[0][0], kv[1][0], cu, cu, 100, 100
    results = [*ops.attention(q, *kv, 0.125, True), *ops.attention_varlen(*pack, 0.125, True)]
    results += ops.attention_backward(q.contiguous(), None, q, *kv, *results[:2], 0.125, True)
    dout = pack[0].contiguous()
    results += ops.attention_varlen_backward(dout, None, *pack[:3], *results[2:4], *pack[3:], 0.125, True)
    return [*results, *ops.attention(q[:, :3], *kv, 0.125, True)]


def norm_step(x: Tensor) -> list[Tensor]:
    """Norms, rotation and gate."""
    q, w = x.view(1, -1, 4, 64), x[0]
    results = [sail_ops.swiglu(x, x), sail_ops.rms_norm(x, w), *sail_ops.add_layer_norm(x, x, w, w)]
    results += ops.rms_norm_backward(x, None, x, w, 1e-6, True, True)
    results += ops.layer_norm_backward(x, None, x, w, 1e-5, True, True, True)
    rotated = q, q, w[:64], w[:64], x[:, :64], x[:, :64]
    results += sail_ops.qk_norm_rope(*rotated)
    return [*results, *ops.qk_norm_rope_backward(q, q, *rotated, None, 1e-6, True)]


def loss_step(x: Tensor, gate_up: Tensor, ids: Tensor) -> list[Tensor]:
    """Two chunks of tokens."""
    return list(ops.linear_cross_entropy(x, gate_up.flatten(0, 1)[:1000], ids[:, 0], None, -100, 1e-3, True, True))


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"result {i}"


def test_a_graph_follows_its_inputs() -> None:
    """Captured once, replayed on other values and another routing: the eager bits."""
    static = on_card()
    step(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(static)
    for seed in (3, 40):
        fresh = on_card(CASE._replace(routing="hot"), seed)
        for old, new in zip(static, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        assert_equal(results, step(fresh))


def test_work_goes_to_the_current_stream() -> None:
    """Inputs arrive late on a side stream: work on any other would read them before."""
    want, late = step(on_card()), on_card()
    stream = torch.cuda.Stream()
    blank = Layer(*(torch.zeros_like(t) for t in late))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for old, new in zip(blank, late, strict=True):
            old.copy_(new)
        results = step(blank)
    stream.synchronize()
    assert_equal(results, want)


def test_nothing_waits_for_the_device() -> None:
    args = on_card()
    step(args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
def test_memory_is_within_the_formulas(recompute: bool) -> None:
    """Saved: x and the pre-activation, 2D + 4FK bytes a token, or x; transient: at most 2DK + 6FK, and the row map."""
    case = ExpertsCase(4096, 1024, 384, 32, 8)
    x, gate_up, down, ids, weights = on_card(case)
    T, D, F, _, K, _ = case
    main = torch.zeros_like(gate_up), torch.zeros_like(down)
    leaves = x.requires_grad_(), gate_up.requires_grad_(), down.requires_grad_(), ids, weights.requires_grad_()

    def train() -> tuple[int, int]:
        before = torch.cuda.memory_allocated()
        y = sail_ops.fused_experts(*leaves, recompute=recompute, main_grads=main)
        saved = torch.cuda.memory_allocated() - before - y.nbytes
        torch.cuda.reset_peak_memory_stats()
        y.backward(y.detach())
        return saved, torch.cuda.max_memory_allocated() - before - saved

    train()
    x.grad = weights.grad = None
    saved, transient = train()
    slack = 1 << 20  # the allocator's rounding
    assert saved <= (0 if recompute else 4 * F * K * T) + slack
    row_map, results = T * K * 20, 3 * T * D * 2 + T * K * 8  # y, dy, dx, dweights
    dots = (F // 64) * T * K * 4
    assert transient <= T * (2 * D * K + 6 * F * K) + row_map + dots + results + slack


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [(700, 0, 129, 1, 300), (0, 0, 0, 0, 0)], ids=["groups", "all_tail"])
def test_grouped_mm_of_several_tiles(dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    """Weights along k and whole vectors: what CUTLASS takes too, under SAIL_OPS_CUDA_KERNELS=cutlass."""
    x = testing.random(1400, 264, dtype=dtype).cuda().requires_grad_()
    w = testing.random(5, 520, 264, dtype=dtype, scale=264**-0.5, seed=1).cuda().transpose(1, 2).requires_grad_()
    ends = offsets(*rows).cuda()
    testing.check_op(sail_ops.grouped_mm, reference.grouped_mm, x, w, ends, pool={"args[1]": 256})
    testing.check_repeatable(sail_ops.grouped_mm, x, w, ends)


def test_grouped_mm_runs_the_kernels_asked_for() -> None:
    asked = os.environ.get("SAIL_OPS_CUDA_KERNELS", "").replace("cluster", "")  # the same kernels, launched otherwise
    wanted = asked or ("sm90" if torch.cuda.get_device_capability() == (9, 0) else "sm80")
    x, w = testing.random(64, 64, dtype=torch.bfloat16).cuda(), testing.random(2, 64, 64, dtype=torch.bfloat16).cuda()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        sail_ops.grouped_mm(x, w.transpose(1, 2), offsets(30, 34).cuda())
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    if not names:
        pytest.skip("the profiler sees no kernels here")
    assert any(wanted in name and "gemm" in name or f"{wanted}::rows_kernel" in name for name in names), names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@several_tiles
def test_both_grouped_gemms_are_accurate(case: ExpertsCase, dtype: torch.dtype) -> None:
    """Sizes that fill several tiles of either kernel, judged against fp64 on the card."""
    args = [t.cuda().requires_grad_(t.is_floating_point()) for t in detached(*layer(case, dtype))]
    op: Callable[..., Tensor] = sail_ops.fused_experts
    testing.check_op(op, reference.fused_experts, *args, pool={"args[1]": 256, "args[2]": 256})
    testing.check_repeatable(op, *args)


@several_tiles
def test_a_graph_of_experts(case: ExpertsCase) -> None:
    """Captured launches, in clusters where they were asked for, give the bits of direct ones."""
    args = on_card(case)
    want = sail_ops.fused_experts(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = sail_ops.fused_experts(*args)
    for _ in range(2):
        got.zero_()
        graph.replay()
        assert torch.equal(got, want)
