"""The loss of Qwen3's causal language models without logits, in training; all else is the class's own forward."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import sail_ops

from .modules import BASE, PARAMETERS, plain


def head_of(model: Any) -> Any:
    """lm_head, or the trained copy of it that PEFT's modules_to_save has made; ValueError unless it is plain."""

    def is_plain(head: Any) -> bool:
        # a subclass of another forward, as a quantized one, has another weight too
        kind = vars(type(head)).get(BASE, type(head))
        unchanged = getattr(kind, "forward", None) is nn.Linear.forward and "forward" not in head.__dict__
        return unchanged and head.bias is None

    want = "torch.nn.Linear without bias, adapter or hooks"
    if type(model.lm_head).__name__ != "ModulesToSaveWrapper":
        return plain(model, "lm_head", is_plain, want)
    wrapper = plain(model, "lm_head", lambda wrapper: "forward" not in wrapper.__dict__, "one without hooks")
    active = [] if wrapper.disable_adapters else wrapper.active_adapters
    if not active:
        return plain(wrapper, "original_module", is_plain, want)
    return plain(wrapper.modules_to_save, active[0], is_plain, want)


def causal_lm_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The class's forward; in training, where labels come and the loss is transformers' default, without logits."""
    given = dict(zip(getattr(self, PARAMETERS), args, strict=False)) | kwargs
    keep = given.get("logits_to_keep", 0)
    whole = isinstance(keep, int) and not keep  # else it is for the class to refuse, or to give a meaning
    if self.training and given.get("labels") is not None and whole and _is_default_loss(self):
        return _without_logits(self, **given)
    return getattr(self, BASE).forward(self, *args, **kwargs)


def _is_default_loss(model: Any) -> bool:
    """Not where somebody has set a loss function or type of their own: that one wants logits."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    return model.loss_function is ForCausalLMLoss


def _without_logits(
    self: Any,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    return_dict: bool | None = None,
    logits_to_keep: int = 0,
    **kwargs: Any,
) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

    experts = hasattr(self, "num_experts")
    if experts and kwargs.get("output_router_logits") is None:
        kwargs["output_router_logits"] = self.config.output_router_logits
    outputs = self.model(attention_mask=attention_mask, return_dict=True, **kwargs)
    loss = _loss(outputs.last_hidden_state, head_of(self), labels, **kwargs)
    fields = {key: outputs.get(key) for key in ("past_key_values", "hidden_states", "attentions")}
    if not experts:
        result: Any = CausalLMOutputWithPast(loss=loss, **fields)
    else:
        aux_loss = None
        if kwargs["output_router_logits"]:
            aux_loss = _aux_loss(self, outputs.router_logits, attention_mask)
            loss = loss + self.router_aux_loss_coef * aux_loss.to(loss.device)
        result = MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, router_logits=outputs.router_logits, **fields)
    as_dict = self.config.return_dict if return_dict is None else return_dict
    return result if as_dict else result.to_tuple()


def _aux_loss(model: Any, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

    arguments: Any = router_logits, model.num_experts, model.num_experts_per_tok, attention_mask
    loss: Any = qwen3_moe.load_balancing_loss_func(*arguments)
    return loss


def _loss(
    hidden_BLD: Tensor,
    head: Any,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    args = hidden_BLD, head.weight, shift_labels.to(hidden_BLD.device).reshape(hidden_BLD.shape[:-1])
    if num_items_in_batch is None:
        return sail_ops.linear_cross_entropy(*args, ignore_index=ignore_index)
    total = sail_ops.linear_cross_entropy(*args, ignore_index=ignore_index, reduction="sum")
    count = num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)
