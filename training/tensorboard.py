"""A run's curves for TensorBoard; a resumed run goes on with them."""

from pathlib import Path
from typing import Any


class TensorBoard:
    """Scalars of each step in `folder`; what was drawn after step `keep_steps` is taken back."""

    def __init__(self, folder: Path, *, keep_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=keep_steps + 1)

    def write(self, line: dict[str, Any]) -> None:
        """The numbers of a line of metrics.jsonl; a list is one curve for each expert layer."""
        for name, value in line.items():
            for layer, number in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(number, int | float) and name != "step":
                    tag = f"{name}/layer {layer}" if isinstance(value, list) else f"training/{name}"
                    self._writer.add_scalar(tag, number, line["step"])

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
