"""What a run lives with, up to a limit, bad records and steps that are not finite; and what ends it: a lost process."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from training import parallel
from training.errors import InputError

SHOWN = 20  # messages about bad records, before only their number grows
EARLY = 100  # records before a share of them says anything


class BadRecords:
    """Counts the records read and those skipped, over all ranks; more than a share `limit` of them ends the run."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.read = self.bad = 0
        self._last = ""

    def add(self, read: int, faults: Iterable[tuple[str, str]]) -> list[str]:
        """Count; the messages to show, one for each (where, reason), until there have been many."""
        self.read += read
        messages = []
        for where, reason in faults:
            self.bad += 1
            self._last = f"{where}: {reason}"
            if self.bad <= SHOWN:
                messages.append(f"skipped {self._last}")
            elif self.bad == SHOWN + 1:
                messages.append("skipped more records; metrics.jsonl goes on counting them")
        return messages

    def check(self) -> None:
        """Raises InputError where too many were bad."""
        if self.bad > self.limit * max(self.read, EARLY):
            raise InputError(
                f"data: {self.bad} of {self.read} records could not be used, more than --max-bad {self.limit:g} allows;"
                f" the last: {self._last}"
            )

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"read": self.read, "bad": self.bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.read, self.bad = state["read"], state["bad"]


class NotFinite:
    """Counts skipped steps; `limit` of them in a row end the run."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = self.in_a_row = 0

    def add(self, finite: bool) -> None:
        """Count one step."""
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.total += not finite

    @property
    def too_many(self) -> bool:
        """Whether training should stop."""
        return self.in_a_row >= self.limit

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.total, self.in_a_row = state["total"], state["in_a_row"]


def report_end(text: str) -> None:
    """Why this process ends, on stderr, unless a process of the run has said so already."""
    if parallel.reports_first():
        print(text, file=sys.stderr, flush=True)


def lost_process(error: RuntimeError) -> str:
    """What to say of a collective that failed because another process is gone."""
    reason = str(error).splitlines()[0].split(". ")[0]  # gloo adds advice
    return (
        f"error: process {os.environ.get('RANK', '0')}: another process of this run has ended or does not answer"
        f" ({reason}); --resume goes on from the last checkpoint"
    )


@contextmanager
def reporting_a_lost_process() -> Iterator[None]:
    """At once, while signals are watched for: torchrun's SIGTERM to those that are left comes in the same moment."""
    try:
        yield
    except RuntimeError as error:
        if parallel.is_lost(error):
            report_end(lost_process(error))
        raise
