"""Types of the public functions' arguments and results.

T tokens, D hidden, F expert width, E experts, K top-k; suffixes on tensors (`weights_TK`).
"""

from typing import NamedTuple

from torch import Tensor

GateUp = Tensor | tuple[Tensor, Tensor]  # [E, 2F, D], gate rows first, or the pair (gate, up) of [E, F, D]
Biases = tuple[Tensor, Tensor]  # [E, 2F] and [E, D]
MainGrads = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]  # (gate_up, down), or (gate, up, down) for a pair


class Routing(NamedTuple):
    """What `route_topk` decides: weights and ids of each token's experts, and the batch statistics."""

    weights_TK: Tensor
    ids_TK: Tensor
    counts_E: Tensor
    prob_sum_E: Tensor
