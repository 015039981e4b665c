"""experts_implementation="sail" against the eager implementation of transformers, on small random models."""

import inspect
import subprocess
import sys
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sail_ops.integrations.transformers import register
from sail_ops.testing import assert_accurate, random

transformers = pytest.importorskip("transformers")
register()

# initializer_range = hidden_size ** -0.5, so that the experts' share of the output is of order one
SMALL: dict[str, Any] = dict(
    vocab_size=96,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.125,
)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", dict(head_dim=16, moe_intermediate_size=48, num_experts=8, num_experts_per_tok=3)),
    "mixtral": ("Mixtral", dict(intermediate_size=40, num_local_experts=4, num_experts_per_tok=2)),
    "olmoe": ("Olmoe", dict(intermediate_size=33, num_experts=8, num_experts_per_tok=2)),
    "deepseek_v3": (
        "DeepseekV3",
        dict(
            num_key_value_heads=4,
            moe_intermediate_size=48,
            intermediate_size=64,
            n_routed_experts=8,
            num_experts_per_tok=4,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=0,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_rope_head_dim=16,
            qk_nope_head_dim=16,
            v_head_dim=16,
        ),
    ),
}


def build_model(name: str, layers: int, implementation: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same random weights for every implementation and dtype."""
    family, options = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **options, "num_hidden_layers": layers})
    torch.manual_seed(0)
    family_class = getattr(transformers, f"{family}ForCausalLM")
    return family_class._from_config(config, experts_implementation=implementation, dtype=torch.float32).to(dtype)


def token_batch() -> Tensor:
    return torch.randint(0, SMALL["vocab_size"], (3, 23), generator=torch.Generator().manual_seed(1))


def train_step(model: Any, autocast: bool = False) -> dict[str, Tensor]:
    """Logits, the loss of every token and every gradient, by name."""
    ids = token_batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids).logits
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    losses.mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits, "losses": losses, **gradients}


def assert_step_accurate(out: dict[str, Tensor], ref: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    """The accuracy rule on each tensor as one row: behind a layer, the elements of a row share their errors.

    A row's error then is one draw, and one in a few hundred rows is over twice another draw by chance. The rows of
    fused_experts itself are tested in test_moe.py.
    """
    assert out.keys() == ref.keys() == base.keys()
    for name in out:
        assert_accurate(*(run[name].flatten() for run in (out, ref, base)), name=name)


def assert_same_step(out: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert out.keys() == expected.keys()
    for name in out:
        assert torch.equal(out[name], expected[name]), name


# ---- whole models ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_model_matches_eager(name: str, dtype: torch.dtype) -> None:
    """One layer in bf16: with more, roundings would flip a routing of one implementation and not of the other."""
    layers = 2 if dtype == torch.float32 else 1
    steps = [
        train_step(build_model(name, layers, implementation, wide))
        for implementation, wide in [("sail", dtype), ("eager", torch.float64), ("eager", dtype)]
    ]
    assert_step_accurate(*steps)
    assert any("experts.gate_up_proj" in key for key in steps[0])


def test_model_under_autocast() -> None:
    model, eager = (build_model("qwen3_moe", 1, implementation) for implementation in ("sail", "eager"))
    exact = build_model("qwen3_moe", 1, "eager", torch.float64)
    assert_step_accurate(train_step(model, autocast=True), train_step(exact), train_step(eager, autocast=True))


@pytest.mark.parametrize("mutation", ["zero", "dropped expert", "swapped gate and up"])
def test_a_wrong_kernel_fails(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above sees each of these."""
    from sail_ops.integrations.transformers import experts as integration

    right = integration.fused_experts

    def wrong(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, **options: Any) -> Tensor:
        if mutation == "dropped expert":
            ids = torch.where(ids == 0, -1, ids)
        if mutation == "swapped gate and up":
            gate_up = gate_up.roll(gate_up.shape[1] // 2, 1)
        return right(x, gate_up, down, ids, weights, **options) * (mutation != "zero")

    monkeypatch.setattr(integration, "fused_experts", wrong)
    steps = [train_step(build_model("qwen3_moe", 1, implementation)) for implementation in ("sail", "eager")]
    exact = train_step(build_model("qwen3_moe", 1, "eager", torch.float64))
    for name in ("logits", "model.layers.0.mlp.experts.gate_up_proj"):
        with pytest.raises(AssertionError, match="over budget|worst element"):
            assert_accurate(*(step[name].flatten() for step in (steps[0], exact, steps[1])))


def test_generate() -> None:
    prompt = token_batch()[:, :5]
    sail, eager = (
        build_model("qwen3_moe", 2, implementation).generate(prompt, max_new_tokens=8, do_sample=False)
        for implementation in ("sail", "eager")
    )
    assert torch.equal(sail, eager)


def test_gradient_checkpointing() -> None:
    model = build_model("qwen3_moe", 2, "sail").train()
    expected = train_step(model)
    again = build_model("qwen3_moe", 2, "sail").train()
    again.gradient_checkpointing_enable()
    assert_same_step(train_step(again), expected)


def test_compile_fullgraph() -> None:
    model = build_model("qwen3_moe", 2, "sail")
    expected = train_step(model)
    torch._dynamo.reset()
    compiled = build_model("qwen3_moe", 2, "sail")
    compiled.forward = torch.compile(compiled.forward, fullgraph=True, backend="aot_eager")
    out, exact = train_step(compiled), train_step(build_model("qwen3_moe", 2, "eager", torch.float64))
    assert_step_accurate(out, exact, expected)


# ---- the experts module alone ---------------------------------------------------------------------------------------
def experts_module(module_name: str, class_name: str, **attributes: Any) -> Any:
    """A family's experts class with random weights: 8 experts, D 64, F 48; `attributes` override the config's."""
    config = {
        "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8, "hidden_size": 64,
        "intermediate_size": 48, "moe_intermediate_size": 48, "hidden_act": "silu", "hidden_activation": "silu",
        "num_experts_per_tok": 3, "swiglu_limit": 0.7, "_experts_implementation": "sail",
    }  # fmt: skip
    name = f"transformers.models.{module_name}.modeling_{module_name}"
    module = pytest.importorskip(name, reason=f"transformers {transformers.__version__} lacks this family")
    experts = getattr(module, class_name)(type("Config", (), {**config, **attributes})())
    for i, parameter in enumerate(experts.parameters()):
        parameter.data = random(*parameter.shape, scale=parameter.shape[-1] ** -0.5, seed=i)
    return experts


def run_experts(experts: Any, x: Tensor, ids: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Output and all gradients of one call."""
    dtype = experts.down_proj.dtype
    x, weights = (t.detach().to(dtype).requires_grad_() for t in (x, weights))
    y = experts(x, ids, weights)
    experts.zero_grad()
    y.backward(random(*y.shape, seed=9).to(dtype))
    return {"y": y, "x": x.grad, "weights": weights.grad} | {n: p.grad for n, p in experts.named_parameters()}


def with_implementation(experts: Any, implementation: str, dtype: torch.dtype) -> Any:
    config = type(experts.config)()
    config._experts_implementation = implementation
    twin = deepcopy(experts).to(dtype)
    twin.config = config
    return twin


def routing(tokens: int = 29, experts: int = 8, k: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    ids = random(tokens, experts, seed=5).topk(k, -1).indices
    return random(tokens, 64, seed=6), ids, random(tokens, k, seed=7).softmax(-1)


GATES = {
    "clamped with act_fn": ("deepseek_v4", "DeepseekV4Experts", {}),
    "clamped with F.silu": ("hy_v4", "HYV4Experts", {}),
    "F.silu as act_fn": ("lfm2_moe", "Lfm2MoeExperts", {}),
    "tanh gelu": ("gemma4", "Gemma4TextExperts", {"hidden_activation": "gelu_pytorch_tanh"}),
    "erf gelu": ("mixtral", "MixtralExperts", {"hidden_act": "gelu"}),
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gate_is_recognized(gate: str, dtype: torch.dtype) -> None:
    family, name, attributes = GATES[gate]
    experts = experts_module(family, name, **attributes).to(dtype)
    x, ids, weights = (t.to(dtype) if t.is_floating_point() else t for t in routing())
    runs = [
        run_experts(with_implementation(experts, implementation, wide), x, ids, weights)
        for implementation, wide in [("sail", dtype), ("eager", torch.float64), ("eager", dtype)]
    ]
    assert_step_accurate(*runs)


MUSE = {"moe_hidden_size": 64, "post_norm_eps": 1e-6}


@pytest.mark.parametrize(
    ("family", "name", "attributes", "complaint"),
    [
        ("gpt_oss", "GptOssExperts", {"swiglu_alpha": 1.702}, "GptOssExperts has is_transposed=True, want False"),
        ("aria", "AriaExperts", {}, "AriaExperts has is_transposed=True, want False"),
        (
            "nemotron_h",
            "NemotronHExperts",
            {"mlp_hidden_act": "relu2", "moe_latent_size": None},
            "NemotronHExperts has has_gate=False",
        ),
        ("muse_spark", "MuseSparkExperts", MUSE, "MuseSparkExperts has has_post_expert_norm=True"),
        ("mixtral", "MixtralExperts", {"hidden_act": "quick_gelu"}, "MixtralExperts has an _apply_gate .*QuickGELU"),
        (
            "minimax_m3_vl",
            "MiniMaxM3VLExperts",
            {"swiglu_alpha": 1.702},
            "MiniMaxM3VLExperts has an _apply_gate .* none of",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_module_raises(family: str, name: str, attributes: Any, complaint: str) -> None:
    experts = experts_module(family, name, **attributes)
    if len(inspect.signature(experts.forward).parameters) != len(routing()):
        pytest.skip(f"transformers {transformers.__version__} has {name} not on its experts interface")
    with pytest.raises(ValueError, match=f'experts_implementation="sail": {complaint}'):
        experts(*routing())


def test_interleaved_rows_raise() -> None:
    """gpt-oss fails on is_transposed first; a class that only interleaves fails on that."""
    experts = experts_module("mixtral", "MixtralExperts")
    experts.is_concatenated = False
    with pytest.raises(ValueError, match="MixtralExperts has is_concatenated=False, want True"):
        experts(*routing())


# ---- expert parallelism ---------------------------------------------------------------------------------------------
def test_sentinel_ids_are_dropped() -> None:
    """Two halves of the experts, the other half's ids set to num_experts: outputs and gradients add up to the whole."""
    whole = experts_module("qwen3_moe", "Qwen3MoeExperts")
    x, ids, weights = routing()
    halves = []
    for first in (0, 4):
        half = with_implementation(whole, "sail", torch.float32)
        half.num_experts, half._is_expert_parallel = 4, True
        half.gate_up_proj = nn.Parameter(whole.gate_up_proj.detach()[first : first + 4].clone())
        half.down_proj = nn.Parameter(whole.down_proj.detach()[first : first + 4].clone())
        mine = (ids >= first) & (ids < first + 4)
        # a sentinel's routing weight may be anything, as nothing may read it
        halves.append(run_experts(half, x, torch.where(mine, ids - first, 4), weights.masked_fill(~mine, torch.nan)))
        assert not halves[-1]["weights"][~mine].any()
    exact, base = (
        run_experts(with_implementation(whole, "eager", dtype), x, ids, weights)
        for dtype in (torch.float64, torch.float32)
    )
    both = {name: halves[0][name] + halves[1][name] for name in ("y", "x", "weights")}
    both |= {name: torch.cat([half[name] for half in halves]) for name in ("gate_up_proj", "down_proj")}
    assert_step_accurate(both, exact, base)


# ---- adapters -------------------------------------------------------------------------------------------------------
class LargestOutput(TorchDispatchMode):
    """The most elements that any operator returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


@pytest.mark.parametrize("target", ["attention", "experts"])
def test_lora_trains_with_frozen_experts(target: str) -> None:
    """LoRA on attention, where no operator may return a dW; and on the expert weights themselves, as `eager` does."""
    peft = pytest.importorskip("peft")
    where: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    if target == "experts":
        where["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

    def adapted(implementation: str, dtype: torch.dtype = torch.float32) -> Any:
        base = build_model("qwen3_moe", 2, implementation)
        torch.manual_seed(1)
        return peft.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False, **where)).to(dtype)

    model = adapted("sail")
    weight = next(p for name, p in model.named_parameters() if "gate_up_proj" in name and "lora" not in name)
    with LargestOutput() as largest:
        step = train_step(model)
    assert_step_accurate(step, train_step(adapted("eager", torch.float64)), train_step(adapted("eager")))
    assert weight.grad is None and all("lora" in name for name in step if name not in ("logits", "losses"))
    if target == "attention":
        assert largest.numel < weight.numel()

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(train_step(model)["losses"].mean().item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


# ---- registration ---------------------------------------------------------------------------------------------------
def test_register_is_idempotent_and_takes_a_name() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    before = set(ALL_EXPERTS_FUNCTIONS.valid_keys())
    register()
    register()
    assert set(ALL_EXPERTS_FUNCTIONS.valid_keys()) == before and "sail" in before


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        # importing sail_ops and the integration neither imports nor patches transformers
        ("import sail_ops, sail_ops.integrations.transformers; print('transformers' in sys.modules)", "False"),
        (
            "from sail_ops.integrations.transformers import register; sys.modules['transformers'] = None\n"
            "try: register()\nexcept ImportError as error: print(error)",
            "needs transformers >= 5.0",
        ),
    ],
    ids=["import", "absent"],
)
def test_import_is_lazy(code: str, expected: str) -> None:
    out = subprocess.run([sys.executable, "-c", f"import sys; {code}"], capture_output=True, text=True, check=True)
    assert expected in out.stdout
