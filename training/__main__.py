"""`python -m training`: train by a recipe."""

from collections.abc import Sequence

from training import cli, parallel
from training.assemble import assemble
from training.run import train

DESCRIPTION = """Train SAIL-VL2 by a recipe, on conversations of your own. One process, or several:

  python -m training --recipe sft --data conversations.jsonl --model FOLDER --out runs/mine
  torchrun --nproc_per_node=2 -m training --recipe sft --data mixture.yaml --model FOLDER --out runs/mine
  python -m training --config mine.yaml
  python -m training --resume runs/mine

Ctrl-C or SIGTERM writes a checkpoint first. The run's folder holds checkpoints/, metrics.jsonl, tensorboard/ and
model/, which from_pretrained loads. docs/train-your-own.md goes from a folder of pictures to an answer."""


def main(arguments: Sequence[str]) -> None:
    """Parse, put the parts together, train."""
    command = cli.read(cli.parser("training", DESCRIPTION, out="runs/train", recipe="sft"), arguments)
    parallel.start_processes(command.device)
    train(command, assemble(command.plan[0], command.start))


if __name__ == "__main__":
    cli.run(main)
