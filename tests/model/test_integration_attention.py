"""attn_implementation="sail" against the eager implementation of transformers, on small random models."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sail_ops.integrations.transformers import register
from sail_ops.testing import assert_accurate

transformers = pytest.importorskip("transformers")
register()

SMALL: dict[str, Any] = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16
)
LENGTHS = [9, 1, 23]


def decoder(implementation: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The same random weights for every implementation and dtype."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        **{**SMALL, "num_key_value_heads": 2, "initializer_range": 0.125, "pad_token_id": 0, **options}
    )
    model = transformers.Qwen3ForCausalLM._from_config(config, attn_implementation=implementation)
    return model.to(dtype).train()


def ids(B: int, S: int) -> Tensor:
    return torch.randint(1, 96, (B, S), generator=torch.Generator().manual_seed(1))


def step(model: Any, real: Tensor | None = None, **inputs: Any) -> dict[str, Tensor]:
    """Logits of the real tokens, and the matrices' gradients: a norm's 16 numbers err by chance."""
    logits = model(**inputs).logits
    logits = logits.flatten(0, 1) if real is None else logits[real]
    targets = torch.arange(len(logits)) % 96
    torch.nn.functional.cross_entropy(logits, targets).backward()
    return {
        "logits": logits.detach(),
        **{n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.dim() == 2},
    }


def assert_step_accurate(
    real: Tensor | None, ours: dict[str, Any], theirs: dict[str, Any], implementation: str = "eager"
) -> None:
    out = step(decoder("sail"), real, **ours)
    ref, base = (step(decoder(implementation, dtype), real, **theirs) for dtype in (torch.float64, torch.float32))
    assert out.keys() == ref.keys()
    for name, value in out.items():
        assert_accurate(value, ref[name], base[name], name=name, pool=64)


def test_causal() -> None:
    assert_step_accurate(None, {"input_ids": ids(2, 33)}, {"input_ids": ids(2, 33)})


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    mask = torch.arange(33) < torch.tensor([33, 20, 7])[:, None]
    mask = mask.flip(1) if side == "left" else mask
    inputs = {"input_ids": ids(3, 33), "attention_mask": mask.long()}
    assert_step_accurate(mask, inputs, inputs, "sdpa")  # eager gives NaN to left padding in fp64


def pack() -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and lengths of a stream; only without a cache transformers looks for positions that start anew."""
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 23, "max_length_k": 23}
    return {"input_ids": ids(1, sum(LENGTHS)), "position_ids": positions, "use_cache": False}, lengths


def test_pack_of_sequences() -> None:
    inputs, lengths = pack()
    assert_step_accurate(None, {**inputs, **lengths}, inputs)


@pytest.mark.parametrize("padding", [0, 4])
def test_generate(padding: int) -> None:
    prompt = ids(2, 9)
    mask = torch.ones_like(prompt)
    mask[1, :padding] = 0
    told = [
        decoder(name).eval().generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False)
        for name in ("sail", "eager")
    ]
    assert torch.equal(*told) and told[0].shape == (2, 21)


def test_bidirectional_encoder() -> None:
    images, outs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), []
    for name, dtype in (("sail", torch.float32), ("eager", torch.float64), ("eager", torch.float32)):
        torch.manual_seed(0)
        config = transformers.Aimv2VisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
        model = transformers.Aimv2VisionModel._from_config(config, attn_implementation=name).to(dtype)
        outs.append(model(images.to(dtype)).last_hidden_state.detach())
    assert_accurate(*outs, pool=64)


def test_compile_fullgraph() -> None:
    """Of packs: while tracing, transformers takes every stream for one whose positions may start anew."""
    model, (inputs, lengths) = decoder("sail"), pack()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want, got = (m(**inputs, **lengths).logits for m in (model, compiled))
    assert torch.equal(want, got)


def call(model: Any, **inputs: Any) -> None:
    model(**{"input_ids": ids(1, 12), **inputs})


WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
ERRORS = {
    "pack_without_lengths": (lambda: call(decoder("sail"), **pack()[0]), "for a pack pass cu_seq_lens_q"),
    "own_mask": (lambda: call(decoder("sail"), attention_mask=torch.zeros(1, 1, 12, 12)), "neither causal nor padding"),
    "sliding_window": (lambda: call(decoder("sail", **WINDOW)), "sliding window of 4"),
    "dropout": (lambda: call(decoder("sail", attention_dropout=0.1)), "attention dropout of 0.1"),
    "static_cache": (
        lambda: decoder("sail").eval().generate(ids(1, 9), max_new_tokens=4, cache_implementation="static"),
        "a cache of",
    ),
}


@pytest.mark.parametrize("run, complaint", ERRORS.values(), ids=ERRORS.keys())
def test_unsupported_raises(run: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        run()
