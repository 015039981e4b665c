"""Gradients reach ZeRO-2's buckets in one order, whatever order they arrive in, and none is left out."""

from typing import Any

import pytest
import torch
from torch import nn

from training.engines.ordered import InOrder

pytestmark = pytest.mark.usefixtures("alone")


class Buckets:
    """What `InOrder` uses of DeepSpeed's optimizer; notes what arrives, and that a backward ended."""

    def __init__(self) -> None:
        self.bit16_groups = [[nn.Parameter(torch.ones(1)) for _ in range(3)], [nn.Parameter(torch.ones(1))]]
        self.named = {id(p): name for p, name in zip(sum(self.bit16_groups, []), "abcd", strict=True)}
        self.got: list[str] = []
        self.reduce_ready_partitions_and_remove_grads: Any = self._reduce
        self.overlapping_partition_gradients_reduce_epilogue: Any = lambda: self.got.append(".")

    def _reduce(self, parameter: nn.Parameter, group: int) -> None:
        assert parameter.grad is not None and any(parameter is own for own in self.bit16_groups[group])
        self.got.append(self.named[id(parameter)])

    def backward(self, arrivals: str) -> str:
        """The order in which the buckets get what arrives in this order; upper case where they get it at once."""
        self.got = []
        for name in arrivals:
            (place,) = ((p, g) for g, own in enumerate(self.bit16_groups) for p in own if self.named[id(p)] == name)
            place[0].grad = torch.ones(1)
            self.reduce_ready_partitions_and_remove_grads(*place)
        at_once = len(self.got)
        self.overlapping_partition_gradients_reduce_epilogue()
        return "".join(self.got[:at_once]).upper() + "".join(self.got[at_once:])


def test_the_first_order_is_kept() -> None:
    buckets = Buckets()
    InOrder(buckets)
    assert buckets.backward("dacb") == "dacb."  # nobody knows the order before the end
    assert buckets.backward("dacb") == "DACB."  # the usual one costs no waiting
    assert buckets.backward("adbc") == "DACB."  # others wait until their turn
    assert buckets.backward("bcad") == "DACB."


def test_a_parameter_without_a_gradient_takes_part_with_zeros() -> None:
    buckets = Buckets()
    InOrder(buckets)
    assert buckets.backward("dac") == "dacb."
    for own in buckets.bit16_groups:
        for parameter in own:
            parameter.grad = None
    assert buckets.backward("acb") == "dacb."
    assert buckets.bit16_groups[1][0].grad.tolist() == [0.0]
