"""apply(model) against the eager implementation of transformers, on small random models; revert leaves no trace."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from sail_ops.integrations.transformers import apply, revert
from sail_ops.testing import assert_accurate, random

transformers = pytest.importorskip("transformers")

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
    assert all("forward" not in module.__dict__ and module.__dict__.keys() == d.keys() for module, d in before.items())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    again = step(name, model, torch.float32)
    assert all(torch.equal(again[key], plain[key]) for key in plain)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_logits_generation_and_loss_options(name: str) -> None:
    plain, patched = build(name, 1, torch.float32).eval(), apply(build(name, 1, torch.float32).eval())
    kwargs = arguments(name, torch.float32)
    ids = kwargs["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(patched(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
        assert patched(**kwargs).logits is None
        got, want = (m(**kwargs, num_items_in_batch=7).loss for m in (patched, plain))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(patched(**kwargs, return_dict=False)[0], plain(**kwargs).loss)
        assert torch.equal(*(m.generate(ids, max_new_tokens=5, do_sample=False) for m in (patched, plain)))


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
    assert not any("forward" in module.__dict__ for module in other.modules())


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


def test_lora_on_the_head_is_refused() -> None:
    """The loss has the head's weight alone: the adapter would be left out, and get no gradient."""
    model = adapted("lm_head")
    with pytest.raises(ValueError, match=HEAD):
        apply(model)
    assert not any("forward" in module.__dict__ for module in model.modules())

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
    """Before the class's forward of a module that is patched: refused. Around a whole model: it runs, and stays."""
    model, calls = build("qwen3", 1, torch.float32), []
    model.model.norm.forward = model.model.norm.forward
    with pytest.raises(ValueError, match="this Qwen3RMSNorm has a forward of its own"):
        apply(model)
    del model.model.norm.forward
    inner = model.forward
    model.forward = around = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    apply(model)(**arguments("qwen3", torch.float32))
    assert calls == [1] and revert(model).forward is around
