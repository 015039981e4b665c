"""What `forward(labels=...)` adds up: cross-entropy without logits, whatever the head is, and the balance loss."""

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from tiny_model import PAD, exact_ops, lively_model, one_thread, pixels, prompt, tiny_config
from torch import Tensor, nn

import sail_ops
from sail_model import SailVL2ForConditionalGeneration
from sail_ops.testing import assert_accurate

Model = SailVL2ForConditionalGeneration


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def model() -> Model:
    return lively_model(tiny_config(True)).train()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Two padded prompts with a tile each; all but the first five tokens are labelled."""
    rows = [prompt(1, 9, 1), prompt(1, 14, 2)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    labels = torch.where((torch.arange(ids.shape[1]) >= 5) & (ids != PAD), ids, -100)
    return dict(input_ids=ids, attention_mask=(ids != PAD).long(), labels=labels, pixel_values=pixels(2))


def by_hand(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


# ---- logits ---------------------------------------------------------------------------------------------------------
def test_logits_are_made_where_they_are_asked_for(model: Model, batch: dict[str, Tensor]) -> None:
    """As with Liger's `skip_logits`: the Trainer's evaluation collects logits, its training does not."""
    training = model(**batch)
    assert training.logits is None and model(**batch, skip_logits=False).logits is not None
    model.eval()
    evaluated = model(**batch)
    assert evaluated.logits is not None and model(**batch, skip_logits=True).logits is None
    assert torch.equal(training.loss, evaluated.loss)
    text = {name: value for name, value in batch.items() if name != "labels"}
    assert torch.equal(model.train()(**text).logits, evaluated.logits)
    with pytest.raises(ValueError, match="skip_logits needs labels"):
        model(**text, skip_logits=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_those_of_the_logits(dtype: torch.dtype, batch: dict[str, Tensor]) -> None:
    """All experts are chosen, as in the parity tests: runs that round differently could choose differently."""
    config = tiny_config(True, num_experts_per_tok=8)

    def step(dtype: torch.dtype, from_logits: bool) -> tuple[Tensor, Tensor]:
        model = lively_model(config).to(dtype).train()
        inputs = batch | dict(pixel_values=batch["pixel_values"].to(dtype))
        out = model(**inputs, skip_logits=False)
        loss = by_hand(out.logits, batch["labels"]) if from_logits else out.loss
        loss.backward()
        gradients = [p.grad.flatten().double() for p in model.language_model.parameters()]
        return loss.detach(), torch.cat(gradients)

    with exact_ops():
        wanted = step(torch.float64, False)
    for name, got, want, base in zip(("loss", "gradients"), step(dtype, False), wanted, step(dtype, True), strict=True):
        assert_accurate(got, want, base, name=name)


def test_no_labels_at_all(model: Model, batch: dict[str, Tensor]) -> None:
    """As in torch a mean over nothing is NaN; a sum over nothing is 0, and so are its gradients."""
    batch["labels"].fill_(-100)
    assert model(**batch).loss.isnan()
    loss = model(**batch, num_items_in_batch=7, output_router_logits=True).loss
    loss.backward()
    assert loss == 0 and not any(weight.grad.any() for weight in model.parameters() if weight.grad is not None)


# ---- heads ----------------------------------------------------------------------------------------------------------
def lora(model: Model) -> nn.Module:
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    for name, weight in adapted.named_parameters():
        weight.data += 0.1 * ("lora_B" in name)
    return adapted


def saved(model: Model) -> nn.Module:
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    next(w for name, w in adapted.named_parameters() if "modules_to_save" in name).data *= 2
    return adapted


def with_bias(model: Model) -> nn.Module:
    head = nn.Linear(64, 300)
    head.weight = model.language_model.lm_head.weight
    model.set_output_embeddings(head)
    return model


def hooked(model: Model) -> nn.Module:
    model.language_model.lm_head.register_forward_hook(lambda _, __, out: 2 * out)
    return model


def patched(model: Model) -> nn.Module:
    head = model.language_model.lm_head
    head.forward = lambda x: 2 * F.linear(x, head.weight)
    return model


def wider(model: Model) -> nn.Module:
    model.resize_token_embeddings(310)
    return model


def of_fp32(model: Model) -> nn.Module:
    model.bfloat16().language_model.lm_head.float()
    model.language_model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    return model


@pytest.mark.parametrize("change", [lora, saved, with_bias, hooked, patched, wider, of_fp32])
def test_heads_of_all_kinds(change: Callable[[Model], nn.Module], model: Model, batch: dict[str, Tensor]) -> None:
    changed = change(model).train()
    out = changed(**batch, skip_logits=False)
    torch.testing.assert_close(out.loss, by_hand(out.logits, batch["labels"]))
    out.loss.backward()
    heads = {name: w for name, w in changed.named_parameters() if "lm_head" in name and w.requires_grad}
    assert heads and all(weight.grad.any() for weight in heads.values())


def test_a_plain_head_makes_no_logits(model: Model, batch: dict[str, Tensor]) -> None:
    """Neither as it is, nor with more rows, nor under autocast."""
    heads: list[nn.Module] = []
    call = nn.Module.__call__

    def noted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        heads.extend([module] * (module is model.language_model.lm_head))
        return call(module, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__call__", noted)
        model(**batch)
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch)
        wider(model)(**batch)
        assert not heads
        model(**batch, skip_logits=False)
        assert heads


# ---- balance loss ---------------------------------------------------------------------------------------------------
def test_balance_loss_is_the_mean_over_layers(model: Model, batch: dict[str, Tensor]) -> None:
    text = model.config.text_config
    plain, out = model(**batch), model(**batch, output_router_logits=True)
    layers = [
        sail_ops.load_balancing_loss(*row, out.num_tokens) for row in zip(out.counts_ME, out.prob_sum_ME, strict=True)
    ]
    assert plain.aux_loss is None and len(layers) == 3
    torch.testing.assert_close(out.aux_loss, sum(layers) / 3)
    torch.testing.assert_close(out.loss, plain.loss + text.router_aux_loss_coef * out.aux_loss)
    text.output_router_logits, text.router_aux_loss_coef = True, 0.5
    torch.testing.assert_close(model(**batch).loss, plain.loss + 0.5 * out.aux_loss)
    assert torch.equal(model(**batch, output_router_logits=False).loss, plain.loss)
    without_labels = model(**{name: value for name, value in batch.items() if name != "labels"})
    assert without_labels.loss is None and torch.equal(without_labels.aux_loss, out.aux_loss)


def test_balance_loss_leaves_padding_out(model: Model, batch: dict[str, Tensor]) -> None:
    ids = torch.cat([row[mask.bool()] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)])
    lengths = batch["attention_mask"].sum(1)
    stream = dict(input_ids=ids[None], cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)), pixel_values=batch["pixel_values"])
    padded, packed = (model(**each, output_router_logits=True) for each in (batch, stream))
    torch.testing.assert_close(padded.aux_loss, packed.aux_loss)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_balance_loss_reaches_the_routers(reentrant: bool | None, model: Model, batch: dict[str, Tensor]) -> None:
    """With and without activation checkpointing, its gradient is what the two losses differ by."""
    gates = [layer.mlp.gate.weight for layer in model.language_model.model.layers]
    out = model(**batch, output_router_logits=True)
    want = torch.autograd.grad(by_hand(model(**batch, skip_logits=False).logits, batch["labels"]), gates)
    balance = torch.autograd.grad(out.aux_loss, gates)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.config.text_config.router_aux_loss_coef = 2.0
    got = torch.autograd.grad(model(**batch, output_router_logits=True).loss, gates) if not reentrant else None
    if reentrant:  # which knows no torch.autograd.grad
        model(**batch, output_router_logits=True).loss.backward()
        got = tuple(gate.grad for gate in gates)
    for ours, wanted, part in zip(got, want, balance, strict=True):
        assert part.any()
        torch.testing.assert_close(ours, wanted + 2 * part)


def test_a_dense_model_has_none(batch: dict[str, Tensor]) -> None:
    model = lively_model(tiny_config(False)).train()
    out = model(**batch, output_router_logits=True)
    assert out.aux_loss is None and out.router_logits is None and torch.equal(out.loss, model(**batch).loss)
