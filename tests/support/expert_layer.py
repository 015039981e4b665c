"""Inputs of the expert layer's tests: tensors of a case, and rows already sorted by expert."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sail_ops import testing
from sail_ops.testing import ExpertsCase
from sail_ops.types import Biases, GateUp

# rows of a weight's gradient that are judged together: of an expert with one row it is an outer product, each of its
# rows as far off as one number
POOL = 256


class Layer(NamedTuple):
    """The positional arguments of fused_experts, outputs of order one; all but the ids require gradients."""

    x: Tensor
    gate_up: GateUp
    down: Tensor
    ids: Tensor
    weights: Tensor


def layer(
    case: ExpertsCase,
    dtype: torch.dtype = torch.float32,
    *,
    pair: bool = False,
    weights_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Layer:
    T, D, F, E, K, _ = case
    x = leaf(testing.random(T, D, seed=seed), dtype)
    both = testing.random(E, 2 * F, D, scale=1.5 * D**-0.5, seed=seed + 1)
    gate_up = (leaf(both[:, :F], dtype), leaf(both[:, F:], dtype)) if pair else leaf(both, dtype)
    down = leaf(testing.random(E, D, F, scale=1.5 * F**-0.5, seed=seed + 2), dtype)
    weights = leaf(testing.random(T, K, seed=seed + 3).sigmoid() + 0.25, weights_dtype)
    return Layer(x, gate_up, down, testing.random_ids(case, seed), weights)


def batch(layers: list[Layer]) -> Layer:
    """Several problems stacked, for `one_by_one`."""
    return Layer(*(torch.stack(t).detach().requires_grad_(t[0].requires_grad) for t in zip(*layers, strict=True)))


def one_by_one(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """fn over a batch of problems: one problem's gradients can have so few numbers that their error is chance."""
    return lambda *batches: torch.stack([fn(*problem) for problem in zip(*batches, strict=True)])


def biases(case: ExpertsCase, dtype: torch.dtype) -> Biases:
    first = testing.random(case.E, 2 * case.F, scale=0.5, seed=11)
    return leaf(first, dtype), leaf(testing.random(case.E, case.D, scale=0.5, seed=12), dtype)


def leaf(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype, memory_format=torch.contiguous_format).detach().clone().requires_grad_()


def counts(ids: Tensor, E: int) -> Tensor:
    """Rows of each expert."""
    return torch.stack([(ids == e).sum() for e in range(E)])


def offsets(*rows_of_expert: int) -> Tensor:
    return torch.tensor(rows_of_expert).cumsum(0).int()


def detached(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in tensors)


def double(tree: Any) -> Any:
    """The same values as fp64 leaves; integers stay."""

    def wide(t: Tensor) -> Tensor:
        return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t

    return pytree.tree_map_only(Tensor, wide, tree)
