"""transformers 5.x models on `sail_ops`; transformers itself is imported by the first call, not by this module.

    from sail_ops.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="sail", attn_implementation="sail")

`register()` patches nothing: it names implementations of experts (experts.py) and attention (attention.py).
`apply(model)` takes the rest of a Qwen3, Qwen3-MoE or Aimv2 model along, `revert(model)` takes it back (patches.py).
"""

from .experts import sail_experts_forward
from .patches import apply, revert
from .registration import register

__all__ = ["apply", "register", "revert", "sail_experts_forward"]
