"""Steps as CUDA graphs: captured once, replayed under the clock, so that no launch of the host is in the time."""

from collections.abc import Callable
from typing import Protocol

import torch

from benchmarks.harness import Steps

WARM_UPS = 3  # on the side stream: kernels compile and tune, handles and workspaces are made before the capture


class Graph(Protocol):
    def replay(self) -> None: ...


class Replays:
    """Steps whose `run` replays what one step of `steps` launched; names that synchronize cannot be captured."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.graphs: dict[str, Graph] = {}

    def prepare(self, name: str) -> None:
        """Captures the step when its name comes first; after that a graph needs nothing."""
        if name not in self.graphs:
            self.graphs[name] = capture(lambda: self.steps.prepare(name), lambda: self.steps.run(name))

    def run(self, name: str) -> None:
        """One step."""
        self.graphs[name].replay()


def capture(prepare: Callable[[], None], run: Callable[[], None]) -> Graph:
    """The graph of `run`, each run prepared outside of it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            prepare()
            run()
    torch.cuda.current_stream().wait_stream(side)
    prepare()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph
