"""Gradients into ZeRO 2's buckets in one order on every rank.

DeepSpeed fills a bucket with gradients as they arrive and sums buckets over the ranks place by place. Autograd's order
is that of a rank's own graph, and a graph depends on data: `sail_ops.linear` multiplies few rows by another operator,
whose gradients of weight and bias arrive the other way round. Two ranks in different order add one parameter's gradient
to another's, without a word. Here a gradient waits until all before it in a fixed order have come, which is at once
where the order is the usual one; a parameter without a gradient takes part with zeros.
"""

from typing import Any

import torch
from torch import nn

from training import parallel


class InOrder:
    """Stands between the hooks of DeepSpeed's ZeRO-2 `optimizer` and its buckets.

    The order is that in which the first rank's gradients of the first backward arrived; those all wait for its end.
    """

    def __init__(self, optimizer: Any) -> None:
        self._reduce = optimizer.reduce_ready_partitions_and_remove_grads
        self._finish = optimizer.overlapping_partition_gradients_reduce_epilogue
        optimizer.reduce_ready_partitions_and_remove_grads = self._arrived
        optimizer.overlapping_partition_gradients_reduce_epilogue = self._end_of_backward
        groups = enumerate(optimizer.bit16_groups)
        self._all = [(parameter, group) for group, parameters in groups for parameter in parameters]
        self._numbers = {id(parameter): number for number, (parameter, _) in enumerate(self._all)}
        self._order: list[int] | None = None
        self._arrivals: list[int] = []
        self._waiting: set[int] = set()
        self._next = 0

    def _arrived(self, parameter: nn.Parameter, group: int) -> None:
        number = self._numbers[id(parameter)]
        self._arrivals.append(number)
        self._waiting.add(number)
        while self._order is not None and self._next < len(self._order) and self._order[self._next] in self._waiting:
            self._waiting.remove(self._order[self._next])
            self._reduce(*self._all[self._order[self._next]])
            self._next += 1

    def _end_of_backward(self) -> None:
        if self._order is None:
            first: list[int] = parallel.gather_objects(list(dict.fromkeys(self._arrivals)))[0]
            self._order = first + sorted(set(range(len(self._all))) - set(first))
        for number in self._order[self._next :]:
            parameter, group = self._all[number]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._reduce(parameter, group)
        self._arrivals, self._waiting, self._next = [], set(), 0
        self._finish()
