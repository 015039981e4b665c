"""A micro-batch of one rank: packed streams as tensors, with their pictures decoded."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sail_model.attention import Pack

PADDING = 0


@dataclass
class Batch:
    """B streams of L tokens; N tiles. `sample_BL` is 0 at padding, `branch_BL` is 0 in a sample's own tokens."""

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    labels_BL: Tensor  # aligned with the ids: position i is predicted from i - 1
    sample_BL: Tensor
    branch_BL: Tensor
    pixels: Tensor  # [N, 3, size, size], the tiles of all pictures in the order of their image tokens
    attention: Pack
    labels: int  # positions that are learned
    tokens: int  # without padding
    pairs: int  # (query, key) pairs that attention computes

    def token_mask(self) -> Tensor:
        """True where a token is no padding; bool [B, L]."""
        return self.sample_BL != PADDING

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        """On `device`, pixels in `dtype`; ids and masks keep their types."""
        raise NotImplementedError
