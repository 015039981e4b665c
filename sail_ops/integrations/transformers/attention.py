"""`attn_implementation="sail"`: `attention` and `attention_varlen` for transformers 5.x models.

The attention interface hands a function q [B, H, S, A], k and v [B, G, L, A] and the mask that `sail_attention_mask`
made for the whole model: none, or padding. A pack's lengths come as cu_seq_lens_q and its kin, as for flash attention.
What a model asks for beyond that (other masks, windows narrower than the text, soft caps, sinks, dropout) raises a
ValueError; so does torch.compile without a pack's lengths, as transformers then cannot tell a pack from a sequence.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sail_ops import attention, attention_varlen

_UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # keyword arguments of transformers' attention functions


def sail_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """What the attention function needs to know of a mask, by its shape; where there is none, it asks the module.

    [B, L, 1] bool: causal, with padding; the queries are the last of the L tokens. [B, 1, L] bool: not causal, the keys
    that every query sees, be they its own tokens or another sequence's. L = 0: no padding. [B, 0]: another mask; a
    pack's lengths must come as arguments then.
    """
    from transformers import masking_utils

    causal = mask_function is masking_utils.causal_mask_function
    if local_size is not None and local_size >= kv_length and not use_vmap and mask_function is not None:
        # a window or chunk that all keys are in
        q_S = torch.arange(q_length, device=device) + int(q_offset)
        k_L = torch.arange(kv_length, device=device) + int(kv_offset)
        causal = causal or _is_causal(mask_function, q_S, k_L, batch_size)
    if not causal and mask_function not in (None, masking_utils.bidirectional_mask_function):
        # transformers saw positions that start anew, or the model wants another mask: only the pack's lengths can tell
        return torch.empty(batch_size, 0, dtype=torch.bool, device=device)
    if causal and int(q_offset) + q_length != int(kv_offset) + kv_length:
        _refuse(f"a cache of {kv_length} tokens of which {int(q_offset) + q_length} are filled (use a dynamic cache)")
    whole = torch.empty(batch_size, *((0, 1) if causal else (1, 0)), dtype=torch.bool, device=device)
    if attention_mask is None:
        return whole
    if attention_mask.shape[-1] < kv_length:
        _refuse(f"a mask of {attention_mask.shape[-1]} tokens for {kv_length} keys")
    mask_BL = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if mask_BL.all():
        return whole
    return mask_BL[..., None] if causal else mask_BL[:, None]


def _is_causal(mask_function: Callable[..., Any], q_S: Tensor, k_L: Tensor, batch: int) -> bool:
    """Whether a function of indices is the causal mask over this grid, for every sequence."""
    sequences = torch.arange(batch, device=q_S.device)[:, None, None]
    for q in q_S.split(256):  # a grid of long texts is large
        mask = mask_function(sequences, torch.zeros_like(sequences), q[:, None], k_L)
        if not torch.equal(torch.as_tensor(mask).expand(batch, -1, -1), (k_L <= q[:, None]).expand(batch, -1, -1)):
            return False
    return True


def sail_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """out [B, S, H, A] and no attention weights."""
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            _refuse(f"{name} (in {type(module).__name__})")
    if dropout:
        _refuse(f"attention dropout of {dropout} (in {type(module).__name__})")
    if sliding_window is not None and sliding_window < key.shape[2]:
        _refuse(f"a sliding window of {sliding_window} over {key.shape[2]} keys (in {type(module).__name__})")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        if q.shape[0] != 1:
            _refuse(f"cu_seq_lens_q with a batch of {q.shape[0]}, want one packed stream")
        longest_q, longest_k = _longest(cu_seq_lens_q, max_length_q), _longest(cu_seq_lens_k, max_length_k)
        lengths = cu_seq_lens_q.int(), cu_seq_lens_k.int(), longest_q, longest_k
        out = attention_varlen(q[0], k[0], v[0], *lengths, causal=causal, softmax_scale=scaling)
        return out[None], None
    if attention_mask is None:
        return attention(q, k, v, causal=causal, softmax_scale=scaling), None
    if attention_mask.dim() == 3 and not attention_mask.numel():  # without padding; an empty batch too
        return attention(q, k, v, causal=attention_mask.shape[2] == 1, softmax_scale=scaling), None
    if attention_mask.dim() == 3 and attention_mask.shape[1] == 1:
        return _some_keys(q, k, v, attention_mask[:, 0], scaling), None
    if attention_mask.dim() == 3 and attention_mask.shape[2] == 1:
        return _causal_padded(q, k, v, attention_mask[..., 0], scaling), None
    shape, where = list(attention_mask.shape), type(module).__name__
    _refuse(f"a mask {shape} that is neither causal nor padding (in {where}); for a pack pass cu_seq_lens_q")


def _some_keys(q: Tensor, k: Tensor, v: Tensor, keys_BL: Tensor, scale: float | None) -> Tensor:
    """Every query sees these keys of its sequence; without any, a row of zeros."""
    B, S = q.shape[:2]
    cu_q = torch.arange(B + 1, dtype=torch.int32, device=q.device) * S
    cu_k = nn.functional.pad(keys_BL.sum(1).cumsum(0), (1, 0)).int()
    pack = q.flatten(0, 1), k[keys_BL], v[keys_BL], cu_q, cu_k, S, k.shape[1]
    return attention_varlen(*pack, causal=False, softmax_scale=scale).unflatten(0, (B, S))


def _causal_padded(q: Tensor, k: Tensor, v: Tensor, mask_BL: Tensor, scale: float | None) -> Tensor:
    """The real tokens as a pack; rows of padding give zeros. Queries are the last tokens of the mask."""
    real_q, real_k = mask_BL[:, -q.shape[1] :], mask_BL
    cu_q, cu_k = (nn.functional.pad(m.sum(1).cumsum(0), (1, 0)).int() for m in (real_q, real_k))
    longest = q.shape[1], k.shape[1]
    pack = q[real_q], k[real_k], v[real_k], cu_q, cu_k, *longest
    out = attention_varlen(*pack, causal=True, softmax_scale=scale)
    return torch.zeros_like(q, memory_format=torch.contiguous_format).index_put((real_q,), out)


def _longest(cu_seqlens: Tensor, given: int | None) -> int:
    return int(cu_seqlens.diff().max()) if given is None else int(given)


def _refuse(what: str) -> NoReturn:
    raise ValueError(f'attn_implementation="sail": got {what}, which has no kernel here; "sdpa" or "eager" has')
