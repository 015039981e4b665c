"""Forwards of norms, gated MLPs and attention of Qwen3, Qwen3-MoE and Aimv2, and what each needs of its module.

Projections are called as modules: LoRA or hooks on them work as ever. What a forward computes without calling the
module must be plain, or what an adapter or a hook adds would be left out: q_norm, k_norm and act_fn.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sail_ops

BASE = "_sail_base"  # on a patched class: the class that it was made of, and the names of its forward's arguments
PARAMETERS = "_sail_parameters"
NORMS = ("Qwen3RMSNorm", "Qwen3MoeRMSNorm", "Aimv2RMSNorm")
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def plain(owner: Any, name: str, is_plain: Callable[[Any], bool], want: str) -> Any:
    """The submodule, which a patch computes without calling it; ValueError where that would leave something out."""
    module = getattr(owner, name)
    hooks = [kind for kind in HOOKS if getattr(module, kind, None)]
    if hooks or not is_plain(module):
        kind = f"{type(module).__module__}.{type(module).__name__}"  # LoRA's linear layer is a Linear too
        got = kind + (f" with {', '.join(hooks)}" if hooks else "")
        raise ValueError(f"sail_ops: apply: {type(owner).__name__}.{name} is {got}, want {want}")
    return module


def norm_forward(self: Any, x: Tensor) -> Tensor:
    """`rms_norm` in place of the class's."""
    rows = x if x.stride(-1) == 1 else x.contiguous()  # Aimv2's patches come transposed from a convolution
    return sail_ops.rms_norm(rows, self.weight, self.variance_epsilon)


def linear_forward(self: Any, input: Tensor) -> Tensor:
    """`linear` in place of `F.linear`."""
    return sail_ops.linear(input, self.weight, self.bias)


def check_mlp(mlp: Any) -> None:
    """ValueError unless its gate is silu's."""
    probe = torch.linspace(-4, 4, 9)
    if not torch.allclose(mlp.act_fn(probe), F.silu(probe)):
        raise ValueError(f"sail_ops: apply: {type(mlp).__name__} has act_fn {mlp.act_fn}, want silu")
    _plain_act_fn(mlp)


def _plain_act_fn(mlp: Any) -> None:
    plain(mlp, "act_fn", lambda _: True, "none")  # which the probe has shown


def mlp_forward(self: Any, x: Tensor) -> Tensor:
    """`swiglu` between the projections."""
    _plain_act_fn(self)
    return self.down_proj(sail_ops.swiglu(self.gate_proj(x), self.up_proj(x)))


def head_norms(attention: Any) -> list[Any]:
    """q_norm and k_norm; ValueError where one is not a norm that we know."""

    def is_plain(norm: Any) -> bool:
        return type(norm).__name__ in NORMS and "forward" not in norm.__dict__

    return [plain(attention, name, is_plain, "a norm that we know, without hooks") for name in ("q_norm", "k_norm")]


def attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Qwen3's, with norm and rotation of q and k in one pass, on [B, S, H, A] before heads and tokens change places."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

    heads = (-1, self.head_dim)
    q, k, v = (p(hidden_states).unflatten(-1, heads) for p in (self.q_proj, self.k_proj, self.v_proj))
    q_norm, k_norm = head_norms(self)
    weights = q_norm.weight, k_norm.weight
    q, k = sail_ops.qk_norm_rope(q, k, *weights, *position_embeddings, q_norm.variance_epsilon)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, self.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
    dropout = self.attention_dropout if self.training else 0.0
    options = dict(dropout=dropout, scaling=self.scaling, sliding_window=self.sliding_window)
    out, weights_or_none = attend(self, q, k, v, attention_mask, **options, **kwargs)
    return self.o_proj(out.flatten(2)), weights_or_none
