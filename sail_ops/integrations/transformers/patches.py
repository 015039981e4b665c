"""`apply(model)`: experts, attention, norms, rotary embedding, MLPs, linear layers and loss by `sail_ops`.

Qwen3, Qwen3-MoE and Aimv2 modules of transformers are known, by the names of their classes, and the plain nn.Linear of
a model that has one. A patched module's class becomes a subclass of its own with another forward, as
torch.nn.utils.parametrize does it: a copy, a pickle or an average of the model is patched as the model is, and
`isinstance`, names and signatures answer as before. Weights and checkpoints are never touched. What was the model's
choice of attention and experts is kept on the model, for `revert(model)`.
"""

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NamedTuple

from torch import nn

from .causal_lm import causal_lm_forward, head_of
from .modules import (
    BASE,
    NORMS,
    PARAMETERS,
    attention_forward,
    check_mlp,
    head_norms,
    linear_forward,
    mlp_forward,
    norm_forward,
)
from .registration import register

_CHOICES = "_sail_choices"  # on a patched model: its implementations of attention and experts before


class Patch(NamedTuple):
    """A forward, and what raises ValueError where the module is none that it can compute."""

    forward: Callable[..., Any]
    check: Callable[[Any], Any] = lambda _: None


PATCHES = {
    **dict.fromkeys(NORMS, Patch(norm_forward)),
    **dict.fromkeys(("Qwen3MLP", "Qwen3MoeMLP", "Aimv2MLP"), Patch(mlp_forward, check_mlp)),
    **dict.fromkeys(("Qwen3Attention", "Qwen3MoeAttention"), Patch(attention_forward, head_norms)),
    **dict.fromkeys(("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"), Patch(causal_lm_forward, head_of)),
}

LINEAR = Patch(linear_forward)  # of every plain nn.Linear of a model that has one of these


def apply(model: nn.Module) -> nn.Module:
    """Patch every module that we know, inside `model`; returns it. ValueError where there is none, or it was done.

    In training, with labels and transformers' own loss, the causal language models then compute the loss without
    logits and leave these out of what they return; in evaluation, or with a loss function of your own, they answer as
    before. ValueError too, here or in the call after a change, where an adapter, a hook or a wrapper is around a module
    that a patch does not call: lm_head has to be an nn.Linear without bias (or PEFT's modules_to_save of one), q_norm
    and k_norm norms that we know; and where a module has a forward of its own, such as accelerate's: apply first.
    """
    if patched_modules(model):
        raise ValueError(f"sail_ops: apply: {type(model).__name__} is patched already; revert(model) first")
    found = [module for module in model.modules() if _is_known(module)]
    if not found:
        raise ValueError(f"sail_ops: apply: {type(model).__name__} has none of {', '.join(sorted(PATCHES))}")
    found += [module for module in model.modules() if _is_plain_linear(module)]
    for module in found:
        if "forward" in module.__dict__:
            raise ValueError(
                f"sail_ops: apply: this {type(module).__name__} has a forward of its own, want its class's"
            )
        _patch_of(type(module)).check(module)
    choices = _use_implementations(model)
    for module in found:
        base: Any = type(module)
        module.__class__ = patched(base)
    if choices:
        setattr(model, _CHOICES, choices)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo `apply(model)`, on the model or on a copy of it; returns it. ValueError where nothing was applied."""
    found = patched_modules(model)
    if not found:
        raise ValueError(f"sail_ops: revert: {type(model).__name__} is not patched")
    for module in found:
        if "forward" in module.__dict__:  # set since, around ours
            raise ValueError(
                f"sail_ops: revert: this {type(module).__name__} has a forward of its own; remove it first"
            )
    for module in found:
        module.__class__ = getattr(type(module), BASE)
    for owner in model.modules():
        for setter, before in owner.__dict__.pop(_CHOICES, ()):
            getattr(owner, setter)(before)
    return model


def patched_modules(model: nn.Module) -> list[nn.Module]:
    """Modules inside `model` whose class is one of ours."""
    return [module for module in model.modules() if BASE in vars(type(module))]


def _is_known(module: nn.Module) -> bool:
    return type(module).__name__ in PATCHES


def _is_plain_linear(module: nn.Module) -> bool:
    """Not an adapter's or a quantized one; one with a forward of its own keeps it, as nothing of ours is lost."""
    return type(module) is nn.Linear and "forward" not in module.__dict__


def _patch_of(base: type[nn.Module]) -> Patch:
    return LINEAR if base is nn.Linear else PATCHES[base.__name__]


@cache
def patched(base: Any) -> Any:
    """The subclass of a known class with our forward, under the same name."""
    ours = _patch_of(base).forward

    @wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        """For pickle and copy: made anew from the class that can be imported."""
        default = super(cls, self).__reduce_ex__(protocol)
        return (_new, (base,), *default[2:]) if type(self) is cls else default

    own = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        BASE: base,
        PARAMETERS: tuple(inspect.signature(base.forward).parameters)[1:],
    }
    cls: Any = type(base.__name__, (base,), own)
    return cls


def _new(base: Any) -> Any:
    cls = patched(base)
    return cls.__new__(cls)


def _use_implementations(model: Any) -> list[tuple[str, str]]:
    """The model's own switches for attention and experts, where it has such modules: their setters, and before."""
    register()
    choices: list[tuple[str, str]] = []
    kinds = {type(module).__name__ for module in model.modules()}
    if any(kind.endswith("Attention") for kind in kinds):
        choices.append(("set_attn_implementation", model.config._attn_implementation))
        model.set_attn_implementation("sail")
    if any(kind.endswith("Experts") for kind in kinds):
        choices.append(("set_experts_implementation", model.get_experts_implementation()))
        model.set_experts_implementation("sail")
    return choices
