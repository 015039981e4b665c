"""`python loader_memory.py FILE...`: PSS of a loader over each file, one after the other: this process and two workers.

Prints a JSON list of {"records", "bytes", "index_s", "index_bytes"}; PSS shares out what processes have in common.
"""

import json
import os
import sys
import time
from pathlib import Path

from sail_model import SailVL2ImageProcessor, SailVL2Processor, train_tokenizer
from training.data.encode import EncodedMixture
from training.data.index import FOLDER
from training.data.loader import StreamLoader
from training.data.mixture import open_data

STEPS = 4


def write_records(path: Path, count: int) -> None:
    """Text-only conversations of about 150 bytes, every one another."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            turns = [{"from": "human", "value": f"what is {number}?"}, {"from": "gpt", "value": f"it is {number} " * 4}]
            file.write(json.dumps({"id": number, "conversations": turns}) + "\n")


def descendants(root: int) -> set[int]:
    """`root` and its children, and theirs: the workers are the fork server's."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
    found = {root}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def pss(process: int) -> int:
    """Bytes of a process, of what it shares its part."""
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) * 1024


def measure(path: Path) -> dict[str, float]:
    began = time.perf_counter()
    mixture = open_data(str(path))
    index_s = time.perf_counter() - began
    processor = SailVL2Processor(SailVL2ImageProcessor(32, 4), train_tokenizer(["what is it?"], 300), tokens_per_tile=4)
    samples = EncodedMixture(mixture, processor, capacity=512)
    loader = StreamLoader(samples, streams=4, capacity=512, seed=0, pad_id=0, workers=2)
    for _ in range(STEPS):
        loader.next()
    processes = descendants(os.getpid())
    assert len(processes) >= 4, "this one, the fork server and two workers"
    total = sum(pss(process) for process in processes)
    loader.close()
    index_bytes = sum(file.stat().st_size for file in (path.parent / FOLDER / path.name).iterdir())
    return {"records": sum(samples.lengths), "bytes": total, "index_s": index_s, "index_bytes": index_bytes}


if __name__ == "__main__":
    print(json.dumps([measure(Path(name)) for name in sys.argv[1:]]))
