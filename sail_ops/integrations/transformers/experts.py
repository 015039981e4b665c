"""`experts_implementation="sail"`: `fused_experts` for every transformers 5.x model on its experts interface.

The interface (transformers/integrations/moe.py) hands a function the experts module, hidden states [T, D], expert ids
[T, K] and routing weights [T, K]. What we support of it is stacked weights [E, 2F, D] = [gate; up] and [E, D, F], with
or without biases, and a gate that `fused_experts` has. All else raises, naming the module and what it would need.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sail_ops import fused_experts
from sail_ops.reference import ACTIVATIONS, gated_activation

# flags of transformers' @use_experts_implementation: what our weight layout needs, and what another value means
_LAYOUT = {
    "has_gate": (True, "experts without a gate have no fused kernel"),
    "is_transposed": (False, "weights are stored [E, in, out], want [E, out, in]"),
    "is_concatenated": (True, "gate and up rows are interleaved, want all gate rows first"),
    "has_post_expert_norm": (False, "a norm of each expert's output cannot be fused"),
}
_GATES: WeakKeyDictionary[nn.Module, tuple[str, float | None]] = WeakKeyDictionary()


def sail_experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """y [T, D] = `fused_experts` of the module's weights. Ids outside [0, E) are dropped: expert parallelism."""
    activation, clamp = _supported_gate(module)
    experts: Any = module  # gate_up_proj and its kin are attributes that nn.Module does not declare
    if top_k_weights.dtype != hidden_states.dtype:
        top_k_weights = top_k_weights.float()
    out_TD = fused_experts(
        hidden_states,
        experts.gate_up_proj,
        experts.down_proj,
        top_k_index,
        top_k_weights,
        activation=activation,
        biases=(experts.gate_up_proj_bias, experts.down_proj_bias) if getattr(experts, "has_bias", False) else None,
        clamp=clamp,
    )
    return out_TD.to(hidden_states.dtype)  # autocast computes in its own dtype; the residual stream keeps its


@torch.compiler.assume_constant_result
def _supported_gate(module: nn.Module) -> tuple[str, float | None]:
    """(activation, clamp) of `fused_experts` that this module's gate is; ValueError if we lack its layout or gate."""
    if module not in _GATES:
        for flag, (wanted, reason) in _LAYOUT.items():
            given = getattr(module, flag, wanted)
            if given != wanted:
                raise ValueError(f"{_named(module)} {flag}={given}, want {wanted}: {reason}")
        _GATES[module] = _recognize_gate(module)
    return _GATES[module]


def _recognize_gate(module: Any) -> tuple[str, float | None]:
    """Find the gate by what it computes, not by its name: try ours, with each number that the module holds as clamp."""
    numbers = sorted({float(v) for v in vars(module).values() if type(v) in (int, float) and 0 < v < 1e4})
    gate_NN, up_NN = _probe(numbers)
    found = module._apply_gate(torch.cat([gate_NN, up_NN], -1)).double()
    for clamp in (None, *numbers):
        for activation in ACTIVATIONS:
            expected = gated_activation(gate_NN, up_NN, activation, clamp)
            if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
                return activation, clamp
    raise ValueError(
        f"{_named(module)} an _apply_gate (act_fn {getattr(module, 'act_fn', None)}) that is none of "
        f"act(gate) * up with act in {sorted(ACTIVATIONS)}, clamped or not"
    )


def _probe(numbers: list[float]) -> tuple[Tensor, Tensor]:
    """Every pair of gate and up from a grid on both sides of each number, fp64 on the CPU, [N, N] each."""
    units = torch.tensor([-3.0, -1.0, -0.5, -0.1, 0.0, 0.2, 0.7, 1.0, 4.0], dtype=torch.float64, device="cpu")
    grid = torch.cat([units * scale for scale in (1.0, *numbers, 1e4)])
    return grid.expand(len(grid), -1), grid[:, None].expand(-1, len(grid))


def _named(module: nn.Module) -> str:
    return f'experts_implementation="sail": {type(module).__name__} has'
