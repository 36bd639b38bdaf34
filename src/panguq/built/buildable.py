"""A compiled model that can be built, and that runs what the cache holds of it."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from panguq.ir.interface import Interface

if TYPE_CHECKING:
    from panguq.built.build import BuildReport
    from panguq.built.built_graph import BuiltGraph

logger = logging.getLogger("panguq")
_LOOKING = threading.RLock()


class Buildable:
    """A model that may run as code from the cache; a subclass has these attributes."""

    interface: Interface
    _device: torch.device
    _built: BuiltGraph | None
    _looked_up: bool

    @property
    def executable(self) -> fx.GraphModule:
        """A subclass says what runs: its graph, prepacked."""
        raise NotImplementedError

    def build(self) -> BuildReport:
        """Compile the graph with torch's compiler, into this user's own cache, and run that code.

        Later calls, other processes and loads of the model find it there (`$PANGUQ_CACHE`, else
        `~/.cache/panguq`). Weights are no part of it. Needs a C++ compiler; what prevents a build
        is said in the report and in one warning, and the graph then runs as it is.
        """
        from panguq.built.build import BuildReport, build_graph
        from panguq.report.progress import terminal_progress

        reason = self._never_built()
        if reason is not None:
            logger.warning("not built, the graph runs uncompiled: %s", reason)
            return BuildReport(None, reasons=(reason,))
        built, report = build_graph(self.executable, self.interface, terminal_progress())
        self._built, self._looked_up = built, True
        return report

    def _forget_built(self) -> None:
        """Look in the cache again: what runs is another graph, or runs elsewhere."""
        self._built, self._looked_up = None, False

    def _never_built(self) -> str | None:
        """Why nothing is built of this model, whatever the machine; None if it is."""
        if self.interface.kind != "causal_lm":
            return "only causal language models are built"
        if self._device.type != "cpu":
            return f"code is built for a CPU, and the model runs on {self._device}"
        return None

    @torch.compiler.disable
    def _running(self) -> Any:
        """The built graph if the cache holds it, which is looked up once, else the graph."""
        executable = self.executable
        if not self._looked_up:
            with _LOOKING:
                if not self._looked_up and self._never_built() is None:
                    from panguq.built.built_graph import look_up

                    self._built = look_up(executable, self.interface)
                self._looked_up = True
        return self._built or executable
