"""SAIL-VL2 on `sail_ops`, in Hugging Face's conventions."""

from transformers import AutoConfig, AutoModelForImageTextToText

from .config import PRESETS, SailViTConfig, SailVL2Config
from .model import SailVL2ForConditionalGeneration, SailVL2Output

AutoConfig.register(SailViTConfig.model_type, SailViTConfig)
AutoConfig.register(SailVL2Config.model_type, SailVL2Config)
AutoModelForImageTextToText.register(SailVL2Config, SailVL2ForConditionalGeneration)

__all__ = [
    "PRESETS",
    "SailVL2Config",
    "SailVL2ForConditionalGeneration",
    "SailVL2Output",
    "SailViTConfig",
]
