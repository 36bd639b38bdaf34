"""Statistics of values whose batches several ranks have seen, each its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, fx

from panguq.ir.input_statistics import InputStatistics
from panguq.ranks import ranks


class InOrder:
    """Sums up `statistics` in the order of all batches, which is what their bits depend on.

    What this rank has seen of a block waits for `block_done`; of one process nothing waits.
    """

    def __init__(self, statistics: Mapping[fx.Node, InputStatistics]) -> None:
        self.statistics = statistics
        self._own: dict[fx.Node, list[InputStatistics]] = defaultdict(list)

    def add(self, node: fx.Node, value: Tensor) -> None:
        """Observe the next batch of this rank's share."""
        if ranks().count == 1:
            self.statistics[node].add(value)
        else:
            self._own[node].append(self.statistics[node].of(value))

    def add_of_expert(self, node: fx.Node, expert: int, rows: Tensor) -> None:
        """Observe rows `[r, k]` of that batch as one expert meets them."""
        into = self.statistics[node] if ranks().count == 1 else self._own[node][-1]
        into.add_of_expert(expert, rows)

    def block_done(self) -> None:
        """All ranks have seen the same values, each of its own batches."""
        if not self._own:
            return
        nodes = list(self._own)
        for found in ranks().exchange([self._own.pop(node) for node in nodes]):
            for node, batches in zip(nodes, found, strict=True):
                for batch in batches:
                    self.statistics[node].merge(batch)
