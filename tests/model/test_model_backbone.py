"""The model without its head: a view on the model's modules; replayed routing, packs, and what frozen parts cost."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from tiny_model import PAD, lively_model, one_thread, pixels, prompt, tiny_config
from torch import Tensor, nn

from sail_model import SailVL2ForConditionalGeneration
from sail_model.attention import Keys, gathered, pack_of, pack_with_keys
from sail_ops import testing

Model = SailVL2ForConditionalGeneration


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def model() -> Model:
    return lively_model(tiny_config(True))


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return dict(input_ids=prompt(1, 9, 1)[None], pixel_values=pixels(1))


def hidden(backbone: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    return backbone(**inputs, **kwargs).last_hidden_state


# ---- a view ---------------------------------------------------------------------------------------------------------
def test_hidden_states_are_those_under_the_logits(model: Model, inputs: dict[str, Tensor]) -> None:
    out = model(**inputs, use_cache=True)
    for backbone in (model.model, model.base_model):
        got = backbone(**inputs, use_cache=True)
        assert torch.equal(model.language_model.lm_head(got.last_hidden_state), out.logits)
        assert torch.equal(got.image_hidden_states, out.image_hidden_states)
        assert got.past_key_values.get_seq_length() == out.past_key_values.get_seq_length()
        for name in ("counts_ME", "prob_sum_ME", "num_tokens"):
            assert torch.equal(got[name], out[name])
    assert torch.equal(model.model(**inputs, return_dict=False)[0], hidden(model.model, inputs))


def test_it_is_called_as_trl_calls_it(model: Model, inputs: dict[str, Tensor]) -> None:
    """`base_model` of GRPO's and DPO's fused losses, and of SFT's in chunks, which reads these two fields."""
    out = model.base_model(**inputs, attention_mask=None, use_cache=False, logits_to_keep=3, output_router_logits=True)
    assert out.last_hidden_state.shape == (1, 13, 64) and out.hidden_states is None
    assert [logits.shape for logits in out.router_logits] == [(13, 8)] * 3
    assert model(**inputs).router_logits is None


def test_the_model_does_not_register_it(model: Model) -> None:
    names = [name for name, _ in model.named_modules()]
    assert {name.partition(".")[0] for name in names} == {"", "vision_model", "mlp1", "language_model"}
    ours, its = (sorted(map(id, each.parameters())) for each in (model, model.model))
    assert len(its) == len(ours) - 1, "all but the head"
    model.vision_model.eval(), model.language_model.train()
    assert model.train(False).model.training is False
    model.training = True
    assert model.model.training and not model.vision_model.training, "looking must not switch a part's mode"


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own(twin: Any, model: Model, inputs: dict[str, Tensor]) -> None:
    before = hidden(model.model, inputs)
    other = twin(model)
    for weight in model.parameters():
        weight.data.zero_()
    assert torch.equal(hidden(other.model, inputs), before)


def test_adapters_are_in_it(model: Model, inputs: dict[str, Tensor]) -> None:
    before = hidden(model.base_model, inputs)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp1"]))
    inner = adapted.base_model.model  # what TRL and the Trainer take
    assert torch.equal(hidden(inner.base_model, inputs), before)
    hidden(inner.base_model, inputs).sum().backward()
    trained = {name.rpartition("layers.")[2] for name, weight in adapted.named_parameters() if weight.grad is not None}
    assert trained == {name.rpartition("layers.")[2] for name, w in adapted.named_parameters() if w.requires_grad}
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(0.1)
    changed = hidden(inner.base_model, inputs)
    assert not torch.equal(changed, before)
    torch.testing.assert_close(hidden(adapted.merge_and_unload().base_model, inputs), changed)


# ---- replayed routing -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_replay_gives_the_same(reentrant: bool | None, model: Model, inputs: dict[str, Tensor]) -> None:
    if reentrant is not None:
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    first = model.model(**inputs, output_expert_ids=True)
    assert first.expert_ids_MTK.shape == (3, 13, 2) and first.expert_ids_MTK.dtype == torch.int64
    again = model.model(**inputs, expert_ids_MTK=first.expert_ids_MTK.int(), output_expert_ids=True)
    assert torch.equal(again.last_hidden_state, first.last_hidden_state)
    assert torch.equal(again.expert_ids_MTK, first.expert_ids_MTK)
    gradients = []
    for out in (first, again):
        model.zero_grad()
        out.last_hidden_state.sum().backward()
        gradients.append([layer.mlp.gate.weight.grad for layer in model.language_model.model.layers])
    for wanted, got in zip(*gradients, strict=True):
        assert wanted.any() and torch.equal(got, wanted)


def test_replay_takes_the_experts_given(model: Model, inputs: dict[str, Tensor]) -> None:
    """Other experts in one layer alone: every layer gets its own row, also with a dense layer between."""
    model = lively_model(tiny_config(True, mlp_only_layers=[1]))
    out = model(**inputs, output_expert_ids=True)
    ids = out.expert_ids_MTK.clone()
    ids[1] = torch.tensor([3, 5])
    moved = model(**inputs, expert_ids_MTK=ids)
    assert moved.counts_ME[1].tolist() == [0, 0, 0, 13, 0, 13, 0, 0]
    assert torch.equal(moved.counts_ME[0], out.counts_ME[0]) and not torch.equal(moved.logits, out.logits)


@pytest.mark.parametrize(("shape", "message"), [((2, 13, 2), "of 2 layers"), ((3, 13, 1), "ids"), ((3, 9, 2), "ids")])
def test_replay_of_another_model(shape: Any, message: str, model: Model, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=message):
        model(**inputs, expert_ids_MTK=torch.zeros(shape, dtype=torch.int64))


# ---- packs ----------------------------------------------------------------------------------------------------------
def test_gradients_of_a_key_that_many_sequences_see_are_added_up_in_order() -> None:
    """In advanced indexing's backward several threads would add at once: another sum each time."""
    seen = 3000
    keys = Keys(
        torch.zeros(seen, dtype=torch.int64), torch.ones(seen, dtype=torch.int64), torch.tensor([0, seen]), seen
    )
    t_BSGA = testing.random(1, 3, 2, 32, seed=0).requires_grad_()
    grad_KGA = testing.random(seen, 2, 32, seed=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (found,) = torch.autograd.grad(gathered(t_BSGA, keys), t_BSGA, grad_KGA)
    finally:
        torch.set_num_threads(threads)
    want = torch.zeros_like(t_BSGA)
    for grad_GA in grad_KGA:
        want[0, 1] += grad_GA
    assert torch.equal(found, want)


def test_branches_see_their_prefix_and_themselves(model: Model) -> None:
    """Two rows; in the first, two branches on one prefix with a picture. Each equals its prefix with it alone."""
    prefix, branches, other = prompt(1, 6, 1), [prompt(0, 3, 2), prompt(0, 4, 3)], prompt(0, 15, 4)
    n, (a, b) = len(prefix), map(len, branches)
    columns = torch.arange(n + a + b)
    second = torch.cat([columns[:n], columns[n + a :]])
    rows = [(n, 0, columns[:n]), (a, 0, columns[: n + a]), (b, 0, second)]
    pack = pack_with_keys([*rows, (15, 1, torch.arange(15)), (2, 1, torch.arange(0))])
    ids = torch.stack([torch.cat([prefix, *branches]), F.pad(other, (0, 2), value=PAD)])
    positions = torch.stack([torch.cat([columns[: n + a], columns[n : n + b]]), torch.arange(17)])
    mask = ids != PAD
    arguments = dict(input_ids=ids, position_ids=positions, pixel_values=pixels(1), pack=pack, token_mask=mask)
    out = model(**arguments)
    alone = [torch.cat([prefix, branch]) for branch in branches]
    for row, place, tiles in ((alone[0], (0, columns[: n + a]), 1), (alone[1], (0, second), 1)):
        want = model(input_ids=row[None], pixel_values=pixels(tiles)).logits[0]
        torch.testing.assert_close(out.logits[place], want)
    torch.testing.assert_close(out.logits[1, :15], model(input_ids=other[None]).logits[0])
    assert out.num_tokens == n + a + b + 15 and out.counts_ME.sum(1).tolist() == [2 * out.num_tokens] * 3
    # the loss predicts within sequences alone: not a branch's first token from what lies before it in the row
    labels = torch.where(mask, ids, -100)
    got = model(**arguments, labels=labels).loss
    ends = pack.cu_seqlens[1:].long() - 1
    following = labels.roll(-1, 1).flatten().index_fill(0, ends, -100)
    torch.testing.assert_close(got, F.cross_entropy(out.logits.flatten(0, 1), following))


def test_what_a_pack_excludes(model: Model) -> None:
    ids, cu_seqlens = torch.full((1, 8), 5), torch.tensor([0, 8])
    given = dict(pack=pack_of(cu_seqlens), position_ids=torch.arange(8)[None])
    assert torch.equal(model(ids, **given).logits, model(ids, cu_seqlens=cu_seqlens).logits)
    for change in (dict(position_ids=None), dict(cu_seqlens=cu_seqlens), dict(use_cache=True)):
        with pytest.raises(ValueError, match="pack needs position_ids, and excludes"):
            model(ids, **given | change)


# ---- frozen parts ---------------------------------------------------------------------------------------------------
def saved_in(module: nn.Module, step: Any) -> int:
    """Tensors that autograd keeps of the module's forward during a step."""
    inside, saved = [], []
    with (
        module.register_forward_pre_hook(lambda *_: inside.append(True)),
        module.register_forward_hook(lambda *_: inside.pop() and None),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) if inside else t, lambda t: t),
    ):
        step()
    return len(saved)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_frozen_encoder_keeps_nothing(reentrant: bool | None, model: Model, inputs: dict[str, Tensor]) -> None:
    def step() -> None:
        model(**inputs, labels=inputs["input_ids"])

    model.train()
    assert saved_in(model.vision_model, step) > 0
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.vision_model.requires_grad_(False)
    assert saved_in(model.vision_model, step) == 0
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert {name for name, weight in model.named_parameters() if weight.grad is None} == {
        name for name, weight in model.named_parameters() if name.startswith("vision_model.")
    }


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_an_adapter_alone(reentrant: bool | None, model: Model, inputs: dict[str, Tensor]) -> None:
    """Its gradients are those that it has where all is trained; no other part has any."""
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    want = {name: weight.grad for name, weight in model.mlp1.named_parameters()}
    model.zero_grad()
    model.requires_grad_(False).mlp1.requires_grad_(True)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == {
        f"mlp1.{name}" for name in want
    }
    for name, weight in model.mlp1.named_parameters():
        torch.testing.assert_close(weight.grad, want[name])


def test_text_alone_trains_no_adapter_and_keeps_nothing(model: Model) -> None:
    model.train().requires_grad_(False).mlp1.requires_grad_(True)
    ids = prompt(0, 9, 1)[None]
    assert saved_in(model, lambda: model(input_ids=ids, labels=ids)) == 0


def test_pictures_may_ask_for_a_gradient_of_a_frozen_encoder(model: Model, inputs: dict[str, Tensor]) -> None:
    model.requires_grad_(False)
    inputs["pixel_values"].requires_grad_()
    model(**inputs).logits.sum().backward()
    assert inputs["pixel_values"].grad.any()
