"""`apply(model)`: experts, attention, norms, rotary embedding, MLPs and loss of a transformers model by `sail_ops`.

Qwen3, Qwen3-MoE and Aimv2 modules are known, by the names of their classes. A patch is a `forward` on the module
itself, in front of its class's, or the model's choice of an implementation: `revert(model)` takes it back, weights and
checkpoints are never touched.

Projections are called as modules: LoRA or hooks on them work as ever. What a patch computes without calling the module
must be plain, or what an adapter or a hook adds would be left out: lm_head with labels, q_norm, k_norm and act_fn.
"""

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sail_ops

Undo = Callable[[], Any]
_APPLIED: WeakKeyDictionary[nn.Module, list[Undo]] = WeakKeyDictionary()
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def apply(model: nn.Module) -> nn.Module:
    """Patch every module that we know, inside `model`; returns it. ValueError where there is none, or it was done.

    With labels, the causal language models then compute the loss without logits, and return None for these.
    ValueError too, here or in the call after a change, where an adapter, a hook or a wrapper is around a module that a
    patch does not call: lm_head has to be an nn.Linear without bias, q_norm and k_norm norms that we know.
    """
    if model in _APPLIED:
        raise ValueError(f"sail_ops: apply: {type(model).__name__} is patched already; revert(model) first")
    undo: list[Undo] = []
    try:
        for module in model.modules():
            undo += PATCHES.get(type(module).__name__, lambda _: [])(module)
    except ValueError:
        _take_back(undo)
        raise
    if not undo:
        raise ValueError(f"sail_ops: apply: {type(model).__name__} has none of {', '.join(sorted(PATCHES))}")
    _APPLIED[model] = undo + _use_implementations(model)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo `apply(model)`; returns the model. ValueError where nothing was applied."""
    if model not in _APPLIED:
        raise ValueError(f"sail_ops: revert: {type(model).__name__} is not patched")
    _take_back(_APPLIED.pop(model))
    return model


def _take_back(patches: list[Undo]) -> None:
    for undo in reversed(patches):
        undo()


def _set_forward(module: Any, forward: Callable[..., Any]) -> list[Undo]:
    before = module.__dict__.get("forward")
    module.forward = partial(forward, module)
    return [partial(module.__dict__.pop, "forward") if before is None else partial(setattr, module, "forward", before)]


def _replace_forward(module: Any, forward: Callable[..., Any]) -> list[Undo]:
    """The class's forward; one that accelerate, say, has put in front of it would no longer run."""
    if "forward" in module.__dict__:
        raise ValueError(f"sail_ops: apply: this {type(module).__name__} has a forward of its own, want its class's")
    return _set_forward(module, forward)


def _plain(owner: Any, name: str, is_plain: Callable[[Any], bool], want: str) -> Any:
    """The submodule, which a patch computes without calling it."""
    module = getattr(owner, name)
    hooks = [kind for kind in HOOKS if getattr(module, kind, None)]
    if hooks or not is_plain(module):
        kind = f"{type(module).__module__}.{type(module).__name__}"  # LoRA's linear layer is a Linear too
        got = kind + (f" with {', '.join(hooks)}" if hooks else "")
        raise ValueError(f"sail_ops: apply: {type(owner).__name__}.{name} is {got}, want {want}")
    return module


def _norm(module: nn.Module) -> list[Undo]:
    def forward(self: Any, x: Tensor) -> Tensor:
        rows = x if x.stride(-1) == 1 else x.contiguous()  # Aimv2's patches come transposed from a convolution
        return sail_ops.rms_norm(rows, self.weight, self.variance_epsilon)

    return _replace_forward(module, forward)


def _mlp(module: Any) -> list[Undo]:
    probe = torch.linspace(-4, 4, 9)
    if not torch.allclose(module.act_fn(probe), F.silu(probe)):
        raise ValueError(f"sail_ops: apply: {type(module).__name__} has act_fn {module.act_fn}, want silu")
    _check_mlp(module)

    def forward(self: Any, x: Tensor) -> Tensor:
        _check_mlp(self)
        return self.down_proj(sail_ops.swiglu(self.gate_proj(x), self.up_proj(x)))

    return _replace_forward(module, forward)


def _check_mlp(mlp: Any) -> None:
    _plain(mlp, "act_fn", lambda _: True, "none")  # which the probe has shown


def _attention(module: Any) -> list[Undo]:
    _head_norms(module)
    return _replace_forward(module, _attention_forward)


def _head_norms(attention: Any) -> list[Any]:
    def is_plain(norm: Any) -> bool:
        return PATCHES.get(type(norm).__name__) is _norm

    return [_plain(attention, name, is_plain, "a norm that we know, without hooks") for name in ("q_norm", "k_norm")]


def _attention_forward(
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
    q_norm, k_norm = _head_norms(self)
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


def _causal_lm(module: Any) -> list[Undo]:
    """With labels, the head hands its input on to the loss, in which both are one."""
    whole, before = module.forward, module.__dict__.get("_loss_function")
    _head(module)

    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return whole(*args, **kwargs)
        head = _head(self)
        undo_head = _set_forward(head, lambda _, hidden: hidden)
        self._loss_function = partial(_loss, head)
        try:
            out = whole(*args, labels=labels, **kwargs)
        finally:
            undo_head[0]()
            restore()
        if isinstance(out, tuple):
            return out[0], None, *out[2:]
        out.logits = None
        return out

    def restore() -> None:
        if before is None:
            module.__dict__.pop("_loss_function", None)
        else:
            module._loss_function = before

    return _set_forward(module, forward)


def _head(model: Any) -> Any:
    def is_plain(head: Any) -> bool:
        # a subclass of another forward, as a quantized one, has another weight too
        unchanged = getattr(type(head), "forward", None) is nn.Linear.forward and "forward" not in head.__dict__
        return unchanged and head.bias is None

    return _plain(model, "lm_head", is_plain, "torch.nn.Linear without bias, adapter or hooks")


def _loss(
    head: Any,
    logits: Tensor,  # the head's input, under the name that transformers gives it
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    args = logits, head.weight, shift_labels.reshape(logits.shape[:-1])
    if num_items_in_batch is None:
        return sail_ops.linear_cross_entropy(*args, ignore_index=ignore_index)
    return sail_ops.linear_cross_entropy(*args, ignore_index=ignore_index, reduction="sum") / num_items_in_batch


def _use_implementations(model: Any) -> list[Undo]:
    """The model's own switches for attention and experts, where it has such modules."""
    from .transformers import register

    register()
    undo: list[Undo] = []
    kinds = {type(module).__name__ for module in model.modules()}
    if any(kind.endswith("Attention") for kind in kinds):
        before = model.config._attn_implementation
        model.set_attn_implementation("sail")
        undo.append(partial(model.set_attn_implementation, before))
    if any(kind.endswith("Experts") for kind in kinds):
        before = model.get_experts_implementation()
        model.set_experts_implementation("sail")
        undo.append(partial(model.set_experts_implementation, before))
    return undo


PATCHES: dict[str, Callable[[nn.Module], list[Undo]]] = {
    "Qwen3RMSNorm": _norm,
    "Qwen3MoeRMSNorm": _norm,
    "Aimv2RMSNorm": _norm,
    "Qwen3MLP": _mlp,
    "Qwen3MoeMLP": _mlp,
    "Aimv2MLP": _mlp,
    "Qwen3Attention": _attention,
    "Qwen3MoeAttention": _attention,
    "Qwen3ForCausalLM": _causal_lm,
    "Qwen3MoeForCausalLM": _causal_lm,
}
