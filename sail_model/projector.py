"""From patch features to language-model tokens: pixel shuffle v2, then the two-layer MLP `mlp1`.

Source: SAIL-VL2 report section 2.1; the shuffle is InternVL's (arXiv 2404.16821) with height and width in place.
"""

from torch import Tensor, nn

from .config import SailVL2Config
from .layers import LayerNorm, Linear


def pixel_shuffle(x_NHWC: Tensor, factor: int) -> Tensor:
    """y[n, i, j, (a, b, c)] = x[n, factor*i + a, factor*j + b, c]: each square of patches becomes one token.

    [N, H, W, C] -> [N, H/factor, W/factor, factor^2 * C]; factor must divide H and W.
    """
    n, h, w, c = x_NHWC.shape
    squares = x_NHWC.reshape(n, h // factor, factor, w // factor, factor, c).transpose(2, 3)
    return squares.reshape(n, h // factor, w // factor, factor * factor * c)


class Projector(nn.Sequential):
    """LayerNorm -> Linear -> GELU (erf) -> Linear on shuffled features; released names `mlp1.0`, `mlp1.1`, `mlp1.3`."""

    def __init__(self, config: SailVL2Config) -> None:
        width = config.vision_config.hidden_size * config.shuffle_factor**2
        hidden = config.text_config.hidden_size
        super().__init__(LayerNorm(width), Linear(width, hidden), nn.GELU(), Linear(hidden, hidden))
        self.grid_size, self.factor = config.vision_config.grid_size, config.shuffle_factor

    def forward(self, features_NPC: Tensor) -> Tensor:
        """[N, P, C] patch features -> [N, P / factor^2, D] image tokens, row by row."""
        grid = features_NPC.unflatten(1, (self.grid_size, self.grid_size))
        return super().forward(pixel_shuffle(grid, self.factor).flatten(1, 2))
