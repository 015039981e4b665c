"""attn_implementation="sail" against the eager implementation of transformers, on small random models."""

from typing import Any

import pytest
import torch
from torch import Tensor

import sail_ops
from sail_ops.integrations.transformers import attention, register
from sail_ops.testing import CHANCE, assert_accurate

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


@pytest.mark.parametrize("lengths", [(6, 4), (5, 5), (3, 8)], ids=["longer_source", "equal", "longer_target"])
@pytest.mark.parametrize("kind", ["Bart", "Marian", "M2M100"])
def test_cross_attention(kind: str, lengths: tuple[int, int]) -> None:
    """Queries are another sequence's tokens: the source's padding is no padding of theirs."""
    sizes = dict(vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, max_position_embeddings=32)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64)
    plain = dict(init_std=0.5, pad_token_id=1, dropout=0.0, decoder_start_token_id=2)
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads, **plain)
    torch.manual_seed(0)
    name = {"Marian": "MarianMTModel"}.get(kind, f"{kind}ForConditionalGeneration")
    model = getattr(transformers, name)(config).eval()
    source, target = (torch.randint(3, 96, (2, n), generator=torch.Generator().manual_seed(n)) for n in lengths)
    real = torch.arange(lengths[0]) < torch.tensor([lengths[0], 2])[:, None]
    outs = []
    for implementation, dtype in (("sail", torch.float32), ("eager", torch.float64), ("eager", torch.float32)):
        model.set_attn_implementation(implementation)
        model.to(dtype)
        with torch.no_grad():
            out = model(input_ids=source, attention_mask=real.long(), decoder_input_ids=target, use_cache=False)
        outs.append(out.logits.clone())
        model.to(torch.float32)
    assert_accurate(*outs, k=CHANCE)  # two stacks deep, roundings differ by chance; a wrong mask by the whole value


@pytest.mark.parametrize("window", [21, 4096])
def test_a_window_wider_than_the_text_changes_nothing(window: int) -> None:
    options = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    inputs, padded = {"input_ids": ids(2, 21)}, torch.arange(21) >= torch.tensor([0, 8])[:, None]
    wide, plain = decoder("sail", **options).eval(), decoder("sail").eval()
    for mask in (None, padded.long()):
        assert torch.equal(*(model(**inputs, attention_mask=mask).logits for model in (wide, plain)))
    generated = (m.generate(ids(2, 9), max_new_tokens=12, do_sample=False) for m in (wide, plain))
    assert torch.equal(*generated)


def test_a_chunk_wider_than_the_text_changes_nothing() -> None:
    from transformers.masking_utils import and_masks, causal_mask_function, chunked_overlay

    chunks = and_masks(chunked_overlay(8, torch.zeros(2, dtype=torch.long)), causal_mask_function)
    packed = and_masks(causal_mask_function, lambda b, h, q, k: q // 4 == k // 4)
    mask = attention.sail_attention_mask
    kinds = [mask(2, n, n, mask_function=f, local_size=8).shape[2] for f, n in ((chunks, 8), (chunks, 9), (packed, 8))]
    assert kinds == [attention._CAUSAL, attention._OTHER, attention._OTHER]


@pytest.mark.parametrize("batch, heads, keys", [(1, 1, 1), (1, 4, 5), (2, 2, 5), (4, 4, 4)])
@pytest.mark.parametrize("padding", [False, True])
def test_a_model_that_adds_the_mask_to_its_scores_fails(batch: int, heads: int, keys: int, padding: bool) -> None:
    """Booleans of sizes that broadcast would be added in silence: in attention that is the model's own."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    real = torch.arange(keys).expand(batch, -1) >= int(padding)
    values = torch.ones(batch, heads, keys, 8)
    for function in (causal_mask_function, bidirectional_mask_function, lambda b, h, q, k: q == k):
        mask = attention.sail_attention_mask(batch, keys, keys, mask_function=function, attention_mask=real)
        with pytest.raises(RuntimeError):
            (torch.zeros(batch, heads, keys, keys) + mask).softmax(-1) @ values


def test_without_a_mask_the_module_or_the_call_says_whether_it_is_causal() -> None:
    """As where a model builds no mask at all, a vision tower's for one."""
    x, module = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0)), torch.nn.Identity()
    with pytest.raises(ValueError, match=r"got neither a mask nor is_causal \(in Identity\)"):
        attention.sail_attention_forward(module, x, x, x, None)
    heads = x.transpose(1, 2)
    for causal in (False, True):
        want = sail_ops.attention(heads, heads, heads, causal=causal)
        assert torch.equal(attention.sail_attention_forward(module, x, x, x, None, is_causal=causal)[0], want)
        module.is_causal = causal
        assert torch.equal(attention.sail_attention_forward(module, x, x, x, None)[0], want)


@pytest.mark.parametrize("causal", [True, False])
def test_the_mask_says_whether_it_is_causal_without_padding_too(causal: bool) -> None:
    """Whatever the module says, or does not: the text encoder of Align says nothing, and is not causal."""
    from transformers import masking_utils

    function = masking_utils.causal_mask_function if causal else masking_utils.bidirectional_mask_function
    module, x = torch.nn.Identity(), torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    for given in (None, torch.ones(2, 5, dtype=torch.long)):
        mask = attention.sail_attention_mask(2, 5, 5, mask_function=function, attention_mask=given)
        for module.is_causal in (True, False):
            out, _ = attention.sail_attention_forward(module, x, x, x, mask)
            heads = x.transpose(1, 2)
            assert torch.equal(out, sail_ops.attention(heads, heads, heads, causal=causal))


def test_a_mask_that_is_not_ours_is_refused() -> None:
    """As of a model that hands padding [B, L] past transformers' mask functions: causal or not, nobody has said."""
    x = torch.ones(2, 1, 5, 8)
    with pytest.raises(ValueError, match=r"got a mask \[2, 5\] that is neither causal nor padding"):
        attention.sail_attention_forward(torch.nn.Identity(), x, x, x, torch.ones(2, 5, dtype=torch.bool))


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
