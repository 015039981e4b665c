"""What a run reports: expert-activation entropy, throughput, MFU, memory, one JSON line a step."""

import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training import parallel


def activation_entropy(counts_E: Tensor) -> float:
    """-sum f_e ln f_e / ln E with f = counts / sum: 1 when every expert gets the same share, 0 when one gets all."""
    share = counts_E.double() / counts_E.sum().clamp(min=1)
    return float(-torch.xlogy(share, share).sum() / math.log(max(2, counts_E.numel())))


def dense_matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 1024, seconds: float = 0.5) -> float:
    """FLOP/s of `torch.mm` on square matrices, measured now, on the threads that training uses."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        torch.mm(a, b)
        done += 1
    return done * 2.0 * size**3 / elapsed


# dense bf16 FLOP/s of a card, by a piece of torch.cuda.get_device_name(); NVIDIA's data sheets
PEAKS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "H20": 148e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12}


def peak_flops(dtype: str) -> float:
    """FLOP/s of this process's device, what MFU is a share of: the data sheet's; of others what `torch.mm` reaches."""
    device = parallel.device()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        # the longer name first: H20 is in H200
        for known in sorted(PEAKS, key=len, reverse=True):
            if known in name:
                return PEAKS[known]
    return dense_matmul_rate(getattr(torch, dtype), device)


def peak_memory() -> int:
    """Bytes: the most that the device has held, or of a CPU's process the largest resident set."""
    device = parallel.device()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class FlopCount:
    """FLOPs of one training step: (2 x weights used x tokens + attention) x 3, the count behind "MFU".

    Counted: every matrix a token goes through, the K of E experts it is sent to, attention over the pairs that the
    mask allows. Not counted: norms, softmax, activations, recomputation. Forward costs 1, the gradient of the input 1,
    the gradient of the weights 1: a frozen part costs 1, and 2 where something below it is trained.
    """

    def __init__(self, model: nn.Module, config: Any) -> None:
        text, vision = config.text_config, config.vision_config
        routed = text.num_experts_per_tok / text.num_experts if text.model_type == "qwen3_moe" else 1.0
        weights = {"vision_model": 0.0, "mlp1": 0.0, "language_model": 0.0}
        trained = dict.fromkeys(weights, False)
        for name, parameter in model.named_parameters():
            part = name.split(".")[0]
            trained[part] |= parameter.requires_grad
            if parameter.dim() > 1 and not name.endswith(("pos_embed", "embed_tokens.weight", "lm_head.weight")):
                weights[part] += parameter.numel() * (routed if ".experts." in name else 1.0)
        self.weights, self.times, below = weights, {}, False
        for part in weights:  # in the order of the forward pass
            self.times[part] = 1 + 2 * trained[part] if trained[part] else 1 + below
            below |= trained[part]
        self.head_weights = text.vocab_size * text.hidden_size
        self.patches, self.image_tokens = vision.grid_size**2, config.tokens_per_tile
        self.vision_pair = 4 * vision.num_hidden_layers * vision.hidden_size
        self.text_pair = 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim

    def step(self, tokens: int, labels: int, pairs: int, tiles: int) -> float:
        """FLOPs of `tokens` tokens, `labels` of them predicted, `pairs` allowed (query, key), `tiles` of pictures."""
        text = 2 * (tokens * self.weights["language_model"] + labels * self.head_weights) + pairs * self.text_pair
        encoder = 2 * self.patches * self.weights["vision_model"] + self.patches**2 * self.vision_pair
        adapter = 2 * self.image_tokens * self.weights["mlp1"]
        of_tiles = tiles * (encoder * self.times["vision_model"] + adapter * self.times["mlp1"])
        return text * self.times["language_model"] + of_tiles


class MetricsLog:
    """Appends one JSON object a step to a file; a resumed run first drops the lines after its checkpoint.

    What a full disk does not take waits for the next line.
    """

    def __init__(self, path: Path, *, keep_steps: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_lines(path) if line["step"] <= keep_steps] if path.exists() else []
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        aside.replace(path)
        self._file, self._waiting = path.open("ab", buffering=0), b""

    def write(self, values: dict[str, Any]) -> None:
        """One line, written at once: a run that dies leaves its curve. Raises OSError where the disk is full."""
        self._waiting += json.dumps(values).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> None:
        """Write what waits and close the file. Raises OSError where lines are lost."""
        with self._file:
            self._flush()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The steps that `MetricsLog` wrote; a last line that a crash cut short is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
