"""The pieces of contact.py: every family of operators at sizes that give a persistent block a second tile, so on a card
more tiles than it has multiprocessors. T tokens, D hidden, F expert width, E experts, K top-k, A head dim."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from expert_layer import POOL, detached, layer, offsets
from torch import Tensor

import sail_ops
from sail_ops import reference, testing
from sail_ops.testing import ExpertsCase

BF16 = torch.bfloat16
# rows of a result that share an error: that of few keys' or queries' probabilities, that of a word's few tokens
FEW_KEYS = {"outputs[0]": 64, "args[0]": 256, "args[1]": 1024, "args[2]": 1024}
FEW_TOKENS = {"args[0]": 16, "args[1]": 64}


class Card(NamedTuple):
    """What the sizes follow from; the emulator's tensors are on "cpu"."""

    device: str
    multiprocessors: int


class Case(NamedTuple):
    """A call, what it means, and how many rows of a gradient are judged together (testing.check_op)."""

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = {}
    pool: dict[str, int] = {}


class Piece(NamedTuple):
    """Its cases, and what SAIL_OPS_CUDA_KERNELS is while they run."""

    cases: Callable[[Card], Iterator[Case]]
    kernels: str = ""


def leaf(card: Card, *shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
    return testing.random(*shape, dtype=dtype, scale=scale, seed=seed).to(card.device).requires_grad_()


def case(op: str, *args: Any, name: str = "", pool: dict[str, int] | None = None, **kwargs: Any) -> Case:
    """Of the public operator and the reference of its name."""
    return Case(name or op, getattr(sail_ops, op), getattr(reference, op), args, kwargs, pool or {})


def experts_case(card: Card, routing: str = "uniform") -> ExpertsCase:
    """On 132 multiprocessors 8448 rows and matrices of 1056 x 1056: at least 330 tiles of 128 x 256 a product."""
    sms = card.multiprocessors
    return ExpertsCase(T=32 * sms, D=8 * sms, F=8 * sms, E=8, K=2, routing=routing)


def norms(card: Card) -> Iterator[Case]:
    rows, D = 32 * card.multiprocessors, 16 * card.multiprocessors
    x, residual = (leaf(card, rows, D, seed=s) for s in (0, 1))
    weight, bias = (leaf(card, D, seed=s) for s in (2, 3))
    yield case("rms_norm", x, weight)
    yield case("add_rms_norm", x, residual, weight)
    yield case("layer_norm", x, weight, bias)
    yield case("add_layer_norm", x, residual, weight, bias)
    yield case("swiglu", x, residual)


def rotation(card: Card) -> Iterator[Case]:
    tokens, A = 16 * card.multiprocessors, 128
    q, k = (leaf(card, 1, tokens, heads, A, seed=s) for s, heads in enumerate((8, 2)))
    weights = [leaf(card, A, seed=s) for s in (2, 3)]
    cos, sin = (testing.random(tokens, A, seed=s).to(card.device) for s in (4, 5))
    yield case("rope", q, k, cos, sin)
    yield case("qk_norm_rope", q, k, *weights, cos, sin)


def sort_and_combine(card: Card) -> Iterator[Case]:
    """The router, and a layer whose products are so small that the rows' ways in and out are most of it."""
    T = 64 * card.multiprocessors
    yield case("route_topk", leaf(card, T, 128), 8, renormalize=True)
    sizes = ExpertsCase(T, D=64, F=32, E=32, K=4, routing="dropped")
    yield case("fused_experts", *on_card(card, sizes, gradients=False), name="fused_experts, narrow, dropped ids")


def on_card(card: Card, sizes: ExpertsCase, gradients: bool = True) -> list[Tensor]:
    args = [t.to(card.device) for t in detached(*layer(sizes, BF16))]
    return [t.requires_grad_(gradients and t.is_floating_point()) for t in args]


def groups(R: int) -> list[int]:
    """Rows of nine groups: a large one, none, one, six alike; a seventh of R is left as tail."""
    return [R // 4, 0, 1, *[R // 10] * 6]


def grouped_products(card: Card) -> Iterator[Case]:
    """Weights [E, k, n] along n, and along k as a transposed [E, n, k] has them."""
    sizes = experts_case(card)
    R, D, N = sizes.T * sizes.K, sizes.D, 2 * sizes.F
    ends = offsets(*groups(R)).to(card.device)
    for dtype in (BF16, torch.float16):
        x = leaf(card, R, D, dtype=dtype)
        across = leaf(card, len(ends), D, N, seed=1, scale=D**-0.5, dtype=dtype)
        along = (
            leaf(card, len(ends), N, D, seed=2, scale=D**-0.5, dtype=dtype).detach().transpose(1, 2).requires_grad_()
        )
        for layout, w in (("along n", across), ("along k", along)):
            name = f"grouped_mm, {str(dtype).removeprefix('torch.')}, weights {layout}"
            yield case("grouped_mm", x, w, ends, name=name, pool={"args[1]": POOL})


def gathered_forward(card: Card) -> Iterator[Case]:
    args = on_card(card, experts_case(card), gradients=False)
    yield case("fused_experts", *args, name="fused_experts, forward")


def gated_training(card: Card) -> Iterator[Case]:
    """Both ways to the backward's pre-activation: kept, and computed again."""
    pool = {"args[1]": POOL, "args[2]": POOL}
    for routing, recompute in (("uniform", False), ("hot", True)):
        args = on_card(card, experts_case(card, routing))
        op = recomputing if recompute else sail_ops.fused_experts
        name = f"fused_experts, training, {routing}{', recompute' if recompute else ''}"
        yield Case(name, op, reference.fused_experts, tuple(args), pool=pool)


def recomputing(*args: Tensor) -> Tensor:
    return sail_ops.fused_experts(*args, recompute=True)


def attention(A: int) -> Callable[[Card], Iterator[Case]]:
    def cases(card: Card) -> Iterator[Case]:
        """Causal, 4096 tokens on a card: 320 tiles of 128 queries."""
        S, H, G = min(4096, 40 * card.multiprocessors + 52), min(10, 2 * card.multiprocessors), 2
        q, k, v = (leaf(card, 1, S, heads, A, seed=s) for s, heads in enumerate((H, G, G)))
        yield case("attention", q, k, v, causal=True, name=f"attention, A {A}", pool=FEW_KEYS)
        lengths = (S // 2 + 3, 0, 1, S - S // 2 - 4)
        cu, longest = offsets(0, *lengths).to(card.device), max(lengths)
        pack = [t.detach()[0].requires_grad_() for t in (q, k, v)]
        name = f"attention_varlen, A {A}"
        yield case("attention_varlen", *pack, cu, cu, longest, longest, causal=True, name=name, pool=FEW_KEYS)

    return cases


def loss(card: Card) -> Iterator[Case]:
    T, D, V = 16 * card.multiprocessors, 8 * card.multiprocessors, 128 * card.multiprocessors + 5
    hidden, head = leaf(card, T, D), leaf(card, V, D, seed=1, scale=D**-0.5)
    labels = (torch.arange(T) * 7 % V).where(torch.arange(T) % 5 > 0, -100).to(card.device)
    yield case("linear_cross_entropy", hidden, head, labels, pool=FEW_TOKENS)


# the simplest first; the older kernels that Hopper has newer ones for come last
PIECES = {
    "norms": Piece(norms),
    "rotation": Piece(rotation),
    "sort and combine": Piece(sort_and_combine),
    "grouped_mm": Piece(grouped_products),
    "gathered forward": Piece(gathered_forward),
    "gated forward and backward": Piece(gated_training),
    **{f"attention {A}": Piece(attention(A)) for A in (64, 72, 80, 96, 128)},
    "loss": Piece(loss),
    "clusters": Piece(gated_training, "cluster"),
    "sm_80 grouped_mm": Piece(grouped_products, "sm80"),
    "sm_80 gated forward and backward": Piece(gated_training, "sm80"),
    "sm_80 attention 128": Piece(attention(128), "sm80"),
}
