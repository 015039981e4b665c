"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math


def cosine_with_warmup(step: int, *, peak: float, warmup: int, steps: int, floor: float = 0.0) -> float:
    """lr = peak * (step + 1) / warmup while warming up, then floor + (peak - floor) * (1 + cos(pi t)) / 2.

    t runs from 0 at the end of the warm-up to 1 at `steps`; later steps stay at `floor`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    t = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * t))
