"""Our implementations under a name in transformers' own tables."""

from .attention import sail_attention_forward, sail_attention_mask
from .experts import sail_experts_forward


def register(name: str = "sail") -> None:
    """Make `experts_implementation=name` and `attn_implementation=name` known to transformers; again is harmless.

    ImportError without it.
    """
    try:
        from transformers.integrations.moe import ExpertsInterface
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import AttentionInterface
    except ImportError as error:
        raise ImportError(
            "sail_ops.integrations.transformers needs transformers >= 5.0: pip install 'sail_ops[model]'"
        ) from error
    ExpertsInterface.register(name, sail_experts_forward)
    AttentionInterface.register(name, sail_attention_forward)
    AttentionMaskInterface.register(name, sail_attention_mask)
