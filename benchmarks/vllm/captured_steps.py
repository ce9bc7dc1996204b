"""The captured decode steps of vLLM's two model runners, which a benchmark exchanges."""

from __future__ import annotations

from typing import Any


class CapturedSteps:
    """One model runner's graphs. A set of them is what the runner itself keeps them in."""

    def __init__(self, runner: Any) -> None:
        """`runner` is a worker's model runner: V1 keeps graphs in a wrapper of the model, V2 in a
        manager (vLLM 0.26.0: `compilation/cuda_graph.py`, `v1/worker/gpu/cudagraph_utils.py`)."""
        self._runner = runner
        self._manager = getattr(runner, "cudagraph_manager", None)
        self._name = "concrete_cudagraph_entries" if self._manager is None else "graphs"
        self._owner = getattr(runner, "model", None) if self._manager is None else self._manager
        # Kept for good: with the last of its graphs, the memory pool that all captures share goes.
        self._first = getattr(self._owner, self._name, None)

    @property
    def is_second_runner(self) -> bool:
        """Whether this is vLLM's V2 model runner."""
        return self._manager is not None

    @property
    def can_be_exchanged(self) -> bool:
        """Whether steps are captured whole, where they can be found."""
        return hasattr(self._owner, self._name)

    def capture(self) -> Any:
        """Captures the decode steps of all sizes anew, and puts them in use."""
        self.put({})
        self._runner.capture_model()
        return getattr(self._owner, self._name)

    def put(self, graphs: Any) -> None:
        """Puts a set of graphs in use."""
        setattr(self._owner, self._name, graphs)

    @staticmethod
    def graph(graphs: Any, rows: int) -> Any:
        """The graph of a step of so many rows; StopIteration where there is none."""
        found = next(graph for key, graph in graphs.items() if key.num_tokens == rows)
        return getattr(found, "cudagraph", found)

    def run_eagerly(self) -> None:
        """One step of one row that is not captured, so that each layer is run as Python."""
        if self.is_second_runner:
            self._runner._dummy_run(1, skip_attn=True, is_profile=True)
        else:
            self._runner._dummy_run(1)
