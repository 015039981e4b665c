"""The loader: batches that depend on neither ranks nor workers, resume, and processes that end as they should."""

import json
from typing import Any

import pytest
import torch
from memory_samples import MemorySamples

from training.data.batch import Batch
from training.data.loader import StreamLoader, WorkerDied
from training.errors import InputError

SAMPLES = MemorySamples(bad=((0, 3),), corrupt=((0, 4), (1, 5)))
STEPS = 6


def loader(samples: MemorySamples = SAMPLES, **options: Any) -> StreamLoader:
    chosen = {"streams": 8, "micro_batches": 2, "capacity": 60, "seed": 3, "pad_id": 0, "candidates": 8} | options
    return StreamLoader(samples, **chosen)


Rows = list[tuple[Any, ...]]


def rows_of(batches: list[Batch]) -> list[Rows]:
    """Rows of each micro-batch without padding, and its pixels, to compare between numbers of ranks."""
    found = []
    for batch in batches:
        mask = batch.token_mask()
        columns = (batch.input_ids_BL, batch.position_ids_BL, batch.labels_BL, batch.sample_BL, batch.branch_BL)
        found.append([tuple(tuple(c[b][mask[b]].tolist()) for c in columns) for b in range(len(mask))])
    return found


def steps_of(loaders: list[StreamLoader], count: int) -> tuple[list[list[Rows]], list[list[torch.Tensor]]]:
    """Of each step, micro-batches over all ranks together: rows and pixels."""
    rows, pixels = [], []
    for _ in range(count):
        loaded = [one.next() for one in loaders]
        shares = [rows_of(step.batches) for step in loaded]
        rows.append([[row for share in parts for row in share] for parts in zip(*shares, strict=True)])
        merged = zip(*([batch.pixels for batch in step.batches] for step in loaded), strict=True)
        pixels.append([torch.cat(parts) for parts in merged])
    return rows, pixels


def check_same(one: Any, other: Any) -> None:
    assert one[0] == other[0]
    assert all(torch.equal(a, b) for x, y in zip(one[1], other[1], strict=True) for a, b in zip(x, y, strict=True))


def ranks(world: int, workers: int = 0) -> list[StreamLoader]:
    return [loader(rank=rank, world=world, workers=workers) for rank in range(world)]


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 0), (1, 2), (2, 1), (1, 4)])
def test_batches_depend_on_neither_ranks_nor_workers_and_resume(world: int, workers: int) -> None:
    alone = ranks(1)
    before, want = steps_of(alone, 2), steps_of(alone, STEPS)
    divided = ranks(world, workers)
    check_same(steps_of(divided, 2), before)
    saved = json.loads(json.dumps({k: v for one in divided for k, v in one.state_dict().items()}))
    assert all(saved[str(number)]["waiting"] for number in range(8))
    check_same(steps_of(divided, STEPS), want)  # what was prefetched behind the state is not lost
    again = ranks(1)
    again[0].load_state_dict(saved)  # other ranks, other workers
    check_same(steps_of(again, STEPS), want)
    for one in divided:
        one.load_state_dict(saved)  # and back
    check_same(steps_of(divided, 1), (want[0][:1], want[1][:1]))
    for one in divided:
        one.close()


def test_a_step_reports_what_it_is() -> None:
    one = loader()
    steps = [one.next() for _ in range(20)]
    for step in steps:
        assert step.tiles == [len(batch.pixels) for batch in step.batches]
        positions = sum(batch.input_ids_BL.numel() for batch in step.batches)
        assert step.padding == pytest.approx(1 - sum(batch.tokens for batch in step.batches) / positions)
        assert all((batch.labels_BL[:, 1:] != -100).sum() == batch.labels for batch in step.batches)
    faults = [fault for step in steps for fault in step.faults]
    assert ("0: line 3", "is bad") in faults and ("0: line 4", "CorruptImageError: no picture") in faults


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"streams": 4}, "'streams': 8.*'streams': 4"),
        ({"seed": 4}, "'seed': 3.*'seed': 4"),
        ({"samples": MemorySamples(lengths=(41, 24))}, r"\[40, 24\].*\[41, 24\]"),
    ],
)
def test_the_state_of_other_data_is_refused(change: dict[str, Any], message: str) -> None:
    saved = loader().state_dict()
    with pytest.raises(InputError, match=message):
        loader(**change).load_state_dict(saved)


def test_a_state_without_all_streams_is_refused() -> None:
    saved = loader(rank=1, world=2).state_dict()
    with pytest.raises(InputError, match=r"no state of streams \[0, 1, 4, 5\], want those of all 8"):
        loader().load_state_dict(saved)


def test_streams_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(InputError, match="streams: got 8, want a multiple of micro_batches x processes, 2 x 3"):
        loader(world=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_waiting_sample_that_went_bad_is_an_error(workers: int) -> None:
    one = loader(MemorySamples())
    one.next()
    saved = one.state_dict()
    source, record, _ = saved["0"]["waiting"][0]
    changed = loader(MemorySamples(bad=((source, record),)), workers=workers)
    changed.load_state_dict(saved)
    with pytest.raises(InputError, match=f"waited cannot be read any more: {source}: line {record}: is bad"):
        changed.next()


def test_a_killed_worker_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # seconds; torch's own is 5
    one = loader(MemorySamples(killer=(0, 7)), workers=2)
    with pytest.raises(WorkerDied, match=r"a worker process died .*--resume goes on from the last checkpoint"):
        for _ in range(100):
            one.next()
    one.close()
