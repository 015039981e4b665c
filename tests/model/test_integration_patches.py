"""apply(model) against the eager implementation of transformers, on small random models; revert leaves no trace."""

import inspect
import io
import json
import pickle
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sail_ops.integrations.transformers import apply, revert
from sail_ops.integrations.transformers.patches import patched_modules
from sail_ops.testing import assert_accurate, random

transformers = pytest.importorskip("transformers")
from transformers.utils import find_labels  # noqa: E402

TEXT: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.125,
    pad_token_id=0,
)
MOE = dict(moe_intermediate_size=48, num_experts=8, num_experts_per_tok=3, output_router_logits=True)
VISION = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, image_size=28, patch_size=14)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", TEXT),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", TEXT | MOE),
    "aimv2": ("Aimv2VisionConfig", "Aimv2VisionModel", VISION),
}


def build(name: str, layers: int, dtype: torch.dtype) -> Any:
    """Random weights, the same for every dtype; norms away from one."""
    config_name, model_name, options = MODELS[name]
    all_experts = {"num_experts_per_tok": 8} if name == "qwen3_moe" and layers == 1 else {}  # no routing to flip
    config = getattr(transformers, config_name)(**options | all_experts, num_hidden_layers=layers)
    torch.manual_seed(0)
    eager = {"attn_implementation": "eager"} | ({"experts_implementation": "eager"} if name == "qwen3_moe" else {})
    model = getattr(transformers, model_name)._from_config(config, dtype=torch.float32, **eager)
    for i, (key, weight) in enumerate(model.named_parameters()):
        if "norm" in key:
            weight.data = 1 + 0.2 * random(*weight.shape, seed=i)
    return model.to(dtype)


def arguments(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    if name == "aimv2":
        return {"pixel_values": random(2, 3, 28, 28, dtype=dtype)}
    ids = torch.randint(1, 96, (3, 23), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": torch.where(ids % 5 == 0, -100, ids)}


def step(name: str, model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The loss (of Aimv2: the features) and every gradient, each as one row: elements share errors behind a layer."""
    out = model(**arguments(name, dtype))
    result = out.last_hidden_state if name == "aimv2" else out.loss
    result.backward(random(*result.shape, dtype=result.dtype, seed=9) if result.dim() else None)
    gradients = {key: p.grad.flatten() for key, p in model.named_parameters() if p.grad is not None}
    return {"result": result.detach().flatten(), **gradients}


class Names(TorchDispatchMode):
    """The operators that make a tensor of fp16."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple) else out
        if isinstance(first, Tensor) and first.dtype == torch.float16:
            self.counts[str(op).removesuffix(".default")] += 1
        return out


@pytest.mark.parametrize("name", MODELS)
def test_linear_layers_of_fp16(name: str) -> None:
    """On a CPU they are ours in fp16, whatever its instruction set; torch's are those inside transformers' router."""
    model = apply(build(name, 2, torch.float16)).train()
    linears = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    routers = sum(type(module).__name__ == "Qwen3MoeTopKRouter" for module in model.modules())
    with Names() as names:
        step(name, model, torch.float16)
    heads = name != "aimv2"  # of the loss
    assert names.counts["sail_ops.linear"] == linears - heads and linears - heads >= 8
    assert names.counts["sail_ops.linear_backward"] >= 8
    assert sum(names.counts[f"aten.{product}"] for product in ("mm", "addmm", "bmm")) == 3 * routers


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_model_matches_eager(name: str, dtype: torch.dtype) -> None:
    """One layer of all experts in bf16: roundings would flip a routing of one implementation and not of the other."""
    layers = 2 if dtype == torch.float32 else 1
    ours = step(name, apply(build(name, layers, dtype)), dtype)
    exact, base = (step(name, build(name, layers, d), d) for d in (torch.float64, dtype))
    assert ours.keys() == exact.keys() and len(ours) > 8
    if dtype == torch.bfloat16 and name != "aimv2":  # one number's error is a draw; its gradients have thousands
        del ours["result"]
    for key in ours:
        assert_accurate(ours[key], exact[key], base[key].to(ours[key].dtype), name=key)


@pytest.mark.parametrize("name", MODELS)
def test_revert_leaves_no_trace(name: str) -> None:
    model = build(name, 1, torch.float32)
    before = {module: dict(module.__dict__) for module in model.modules()}
    implementation = model.config._attn_implementation
    state = {key: value.clone() for key, value in model.state_dict().items()}
    plain = step(name, deepcopy(model), torch.float32)
    assert apply(model).config._attn_implementation == "sail"
    assert revert(model).config._attn_implementation == implementation
    assert all(module.__dict__.keys() == d.keys() for module, d in before.items()) and not patched_modules(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    again = step(name, model, torch.float32)
    assert all(torch.equal(again[key], plain[key]) for key in plain)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_logits_generation_and_loss_options(name: str) -> None:
    plain, patched = build(name, 1, torch.float32), apply(build(name, 1, torch.float32))
    kwargs = arguments(name, torch.float32)
    ids = kwargs["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(patched(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
        got, want = (m(**kwargs, num_items_in_batch=7).loss for m in (patched, plain))
        torch.testing.assert_close(got, want)
        shifted = torch.nn.functional.pad(kwargs["labels"], (0, 1), value=-100)[:, 1:]
        torch.testing.assert_close(patched(**kwargs, shift_labels=shifted).loss, plain(**kwargs).loss)
        patched.config.output_router_logits = plain.config.output_router_logits = False  # 5.17 can't, with a cache
        assert torch.equal(*(m.eval().generate(ids, max_new_tokens=5, do_sample=False) for m in (patched, plain)))


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_outputs_are_the_class_s_but_for_logits_in_training(name: str) -> None:
    """By attribute, item, position and as a tuple; in evaluation, or with labels in a position, nothing is missing."""
    plain, patched = build(name, 1, torch.float32), apply(build(name, 1, torch.float32))
    kwargs = arguments(name, torch.float32) | {"output_hidden_states": True}
    for training in (True, False):
        want, got = (m.train(training)(**kwargs) for m in (plain, patched))
        assert type(got) is type(want)
        assert list(got) == [key for key in want if key != "logits" or not training]
        assert (got.logits is None) == training == ("logits" not in got)
        by_tuple = patched(**kwargs, return_dict=False)
        assert [type(value) for value in by_tuple] == [type(value) for value in got.to_tuple()]
        torch.testing.assert_close(got.loss, want.loss)
        torch.testing.assert_close(got.hidden_states, want.hidden_states, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(by_tuple[0], want.loss)
        if name == "qwen3_moe":
            torch.testing.assert_close(got.aux_loss, want.aux_loss)
    by_position = patched(kwargs["input_ids"], None, None, None, None, kwargs["labels"])
    torch.testing.assert_close(by_position.loss, want.loss)


def test_a_loss_of_the_users_own_is_obeyed_and_stays() -> None:
    def own(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
        return logits.sum() * 0 + vocab_size

    kwargs = arguments("qwen3", torch.float32)
    before, after = build("qwen3", 1, torch.float32), apply(build("qwen3", 1, torch.float32))
    before.loss_function = own
    apply(before)
    after.loss_function = own
    for model in (before, after):
        out = model(**kwargs)
        assert out.loss == 96 and out.logits is not None and model.loss_function is own
        assert revert(model).loss_function is own


COPIES = {
    "deepcopy": deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch_save": lambda model: torch.load(saved(model), weights_only=False),
    "average": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
    "copy_of_a_copy": lambda model: deepcopy(pickle.loads(pickle.dumps(model))),
}


def saved(model: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_runs_on_its_own_weights(name: str, how: str) -> None:
    """As the reference model of DPO, or an average of weights; it can be reverted, and the original stays patched."""
    before = step(name, apply(build(name, 1, torch.float32)), torch.float32)
    model = apply(build(name, 1, torch.float32))
    copied = COPIES[how](model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1)
    after = step(name, copied, torch.float32)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert all(weight.grad is None for weight in model.parameters())
    assert copied.config._attn_implementation == "sail"
    assert revert(copied).config._attn_implementation == "eager" and not patched_modules(copied)
    assert patched_modules(model)


@pytest.mark.parametrize("name", MODELS)
def test_a_patched_model_answers_like_its_class(name: str, tmp_path: Path) -> None:
    """What a Trainer, generate, PEFT, accelerate and TRL look at."""
    plain, patched = build(name, 1, torch.float32), apply(build(name, 1, torch.float32))
    for theirs, ours in zip(plain.modules(), patched.modules(), strict=True):
        assert isinstance(ours, type(theirs)) and type(ours).__name__ == type(theirs).__name__
        assert type(ours).__module__ == type(theirs).__module__
        assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    assert [key for key, _ in patched.named_modules()] == [key for key, _ in plain.named_modules()]
    assert list(patched.state_dict()) == list(plain.state_dict())
    assert find_labels(type(patched)) == find_labels(type(plain))
    assert patched.can_generate() == plain.can_generate()
    patched.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(plain).__name__]
    assert type(transformers.AutoModel.from_pretrained(tmp_path)).__name__.startswith(type(plain).__name__[:5])
    if name == "aimv2":
        return
    for model in (plain, patched):
        model.config.output_router_logits = False  # which transformers cannot have with a cache and a mask
    ids = torch.tensor([[0, 0, 0, 5, 6, 7], [9, 8, 7, 6, 5, 4]])  # padded on the left: generate looks for the mask
    assert torch.equal(*(m.eval().generate(ids, max_new_tokens=4, do_sample=False) for m in (plain, patched)))
    assert patched._supports_logits_to_keep() and patched(ids, logits_to_keep=1).logits.shape[1] == 1


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_the_trainer_trains_it_as_its_class(name: str, tmp_path: Path) -> None:
    """Columns are kept, accumulated steps divide by all their labels, evaluation has its logits."""

    def train(model: Any) -> list[float]:
        ids = torch.randint(1, 96, (4, 12), generator=torch.Generator().manual_seed(1))
        rows = [{"input_ids": r, "labels": r.where(r % (2 + i) > 0, -100)} for i, r in enumerate(ids)]
        options = dict(max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=2, logging_steps=1)
        quiet = dict(use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=1e-2)
        arguments = transformers.TrainingArguments(output_dir=str(tmp_path), **options, **quiet)
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert trainer.predict(rows).predictions is not None
        return [*losses, trainer.evaluate()["eval_loss"]]

    ours, theirs = train(apply(build(name, 1, torch.float32))), train(build(name, 1, torch.float32))
    assert len(ours) == 3
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = apply(build("qwen3", 2, torch.float32))
    plain = step("qwen3", model, torch.float32)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    again = step("qwen3", model, torch.float32)
    assert all(torch.equal(again[key], plain[key]) for key in plain)


def test_a_class_made_of_a_patched_one_keeps_its_forward() -> None:
    """FSDP puts a class of its own on a module, as we do."""
    model = apply(build("qwen3", 1, torch.float32))
    want = model(**arguments("qwen3", torch.float32)).loss
    model.__class__ = type("FSDPQwen3ForCausalLM", (type(model),), {})
    out = deepcopy(model)(**arguments("qwen3", torch.float32))
    assert torch.equal(out.loss, want) and out.logits is None


def test_bad_calls() -> None:
    model = build("qwen3", 1, torch.float32)
    with pytest.raises(ValueError, match="revert: Qwen3ForCausalLM is not patched"):
        revert(model)
    apply(model)
    with pytest.raises(ValueError, match="apply: Qwen3ForCausalLM is patched already"):
        apply(model)
    with pytest.raises(ValueError, match="apply: Linear has none of Aimv2MLP"):
        apply(torch.nn.Linear(2, 2))
    config = transformers.Qwen3Config(**TEXT, num_hidden_layers=1, hidden_act="gelu")
    other = transformers.Qwen3ForCausalLM(config)
    with pytest.raises(ValueError, match="Qwen3MLP has act_fn .*, want silu"):
        apply(other)
    assert not patched_modules(other) and other.config._attn_implementation != "sail"


def adapted(target: str, dtype: torch.dtype = torch.float32) -> Any:
    """With LoRA on these modules, whose B is not zeros as at a training's start."""
    peft = pytest.importorskip("peft")
    model = build("qwen3", 1, torch.float32)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=target)
    return peft.get_peft_model(model, config).to(dtype)


def test_lora_on_projections_matches_eager() -> None:
    """They are called as modules: the adapters' part is in the loss, and each gets its gradient."""
    projections = r".*\.(q|k|v|o|gate|up|down)_proj"
    ours = step("qwen3", apply(adapted(projections)), torch.float32)
    exact, base = (step("qwen3", adapted(projections, d), d) for d in (torch.float64, torch.float32))
    assert ours.keys() == exact.keys() and sum("lora" in key for key in ours) == 14
    for key in ours:
        assert_accurate(ours[key], exact[key], base[key].to(ours[key].dtype), name=key)


HEAD = r"Qwen3ForCausalLM.lm_head is (peft|torch)\..*\.Linear, want torch.nn.Linear without bias, adapter or hooks"


@pytest.mark.parametrize("active", [True, False])
def test_a_head_trained_beside_an_adapter(active: bool) -> None:
    """PEFT's modules_to_save: the loss has the weight of the head that is in use, and the gradient goes there."""
    peft = pytest.importorskip("peft")

    def tuned() -> Any:
        model = build("qwen3", 1, torch.float32)
        config = peft.LoraConfig(r=2, target_modules=r".*\.q_proj", modules_to_save=["lm_head"])
        model = peft.get_peft_model(model, config)
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
        return model

    ours, theirs = apply(tuned()), tuned()
    if not active:
        ours.base_model.disable_adapter_layers(), theirs.base_model.disable_adapter_layers()
        ours.requires_grad_(), theirs.requires_grad_()
    got, want = (step("qwen3", model, torch.float32) for model in (ours, theirs))
    assert got.keys() == want.keys() and any("lm_head" in key for key in got)
    for key in got:
        torch.testing.assert_close(got[key], want[key], atol=1e-4, rtol=1e-4)


def test_lora_on_the_head_is_refused() -> None:
    """The loss has the head's weight alone: the adapter would be left out, and get no gradient."""
    model = adapted("lm_head")
    with pytest.raises(ValueError, match=HEAD):
        apply(model)
    assert not patched_modules(model)

    peft, later = pytest.importorskip("peft"), apply(build("qwen3", 1, torch.float32))
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(later, peft.LoraConfig(r=2, init_lora_weights=False, target_modules="lm_head"))
    kwargs = arguments("qwen3", torch.float32)
    with pytest.raises(ValueError, match=HEAD):
        wrapped(**kwargs)
    ids = kwargs["input_ids"]  # without labels the head is called
    torch.testing.assert_close(wrapped(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    revert(later)
    torch.testing.assert_close(wrapped(**kwargs).loss, model(**kwargs).loss)


NOT_CALLED = {
    "lm_head": "Qwen3ForCausalLM.lm_head is .*Linear with _forward_hooks, want",
    "model.layers.0.self_attn.q_norm": "Qwen3Attention.q_norm is .*Qwen3RMSNorm with _forward_hooks",
    "model.layers.0.self_attn.k_norm": "Qwen3Attention.k_norm is .*Qwen3RMSNorm with _forward_hooks",
    "model.layers.0.mlp.act_fn": "Qwen3MLP.act_fn is .* with _forward_hooks",
}


@pytest.mark.parametrize("name, message", NOT_CALLED.items(), ids=NOT_CALLED.keys())
def test_hooks_on_what_is_not_called_are_refused(name: str, message: str) -> None:
    """Before `apply` and after it; elsewhere they run."""
    model = build("qwen3", 1, torch.float32)
    handle = model.get_submodule(name).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=message):
        apply(model)
    handle.remove()
    apply(model)
    model.get_submodule(name).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=message):
        model(**arguments("qwen3", torch.float32))


def test_other_modules_where_none_is_called_are_refused() -> None:
    model = build("qwen3", 1, torch.float32)
    model.lm_head = torch.nn.Linear(64, 96)
    with pytest.raises(ValueError, match=HEAD):
        apply(model)
    peft, model = pytest.importorskip("peft"), build("qwen3", 1, torch.float32)
    tuned = peft.get_peft_model(model, peft.LNTuningConfig(target_modules=["q_norm"]))
    with pytest.raises(ValueError, match="Qwen3Attention.q_norm is .*LNTuningLayer, want a norm"):
        apply(tuned)


def test_forwards_that_others_have_set() -> None:
    """Before `apply`, it would run the class's: refused. After it, it runs ours; `revert` could not take that back."""
    model, calls = build("qwen3", 1, torch.float32), []
    for module in (model, model.model.norm):
        module.forward = module.forward
        with pytest.raises(
            ValueError, match=f"this {type(module).__name__} has a forward of its own, want its class's"
        ):
            apply(model)
        del module.forward
    inner = apply(model).forward
    model.forward = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    assert model(**arguments("qwen3", torch.float32)).logits is None and calls == [1]
    with pytest.raises(ValueError, match="this Qwen3ForCausalLM has a forward of its own; remove it first"):
        revert(model)
    del model.forward
    assert not patched_modules(revert(model))
