"""SAIL-VL2 on `sail_ops`, in Hugging Face's conventions: the Auto classes know it once this package is imported.

model, processor = (cls.from_pretrained(folder) for cls in (SailVL2ForConditionalGeneration, SailVL2Processor))
parts = [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is this?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True
)
ids = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(ids, skip_special_tokens=True))
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

# from its own module: without torchvision, transformers 5.16 and 5.17 have a stand-in in its place that raises
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from .assemble import assemble
from .checkpoint import load_released
from .config import PRESETS, SailViTConfig, SailVL2Config
from .images import CorruptImageError
from .model import SailVL2ForConditionalGeneration, SailVL2Output
from .processor import SailVL2Processor
from .tiling import SailVL2ImageProcessor
from .tokenizer import load_tokenizer, train_tokenizer

AutoConfig.register(SailViTConfig.model_type, SailViTConfig, exist_ok=True)
AutoConfig.register(SailVL2Config.model_type, SailVL2Config, exist_ok=True)
AutoModelForImageTextToText.register(SailVL2Config, SailVL2ForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(SailVL2Config, slow_image_processor_class=SailVL2ImageProcessor, exist_ok=True)
AutoProcessor.register(SailVL2Config, SailVL2Processor, exist_ok=True)
# By these the Trainer tells whose labels its label smoothing must shift, and `transformers serve` what takes pictures.
for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
    names[SailVL2Config.model_type] = SailVL2ForConditionalGeneration.__name__

__all__ = [
    "PRESETS",
    "CorruptImageError",
    "SailVL2Config",
    "SailVL2ForConditionalGeneration",
    "SailVL2ImageProcessor",
    "SailVL2Output",
    "SailVL2Processor",
    "SailViTConfig",
    "assemble",
    "load_released",
    "load_tokenizer",
    "train_tokenizer",
]
