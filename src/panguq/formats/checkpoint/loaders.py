"""What the loaders of one format refuse of a model's quantized linears."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from panguq.errors import ExportError
from panguq.formats.checkpoint.graph import CheckpointGraph
from panguq.formats.checkpoint.linear import LinearForm
from panguq.server_releases import Server
from panguq.servers import ServedFormat, support


def check_loaders(
    linears: Mapping[str, LinearForm],
    form: ServedFormat,
    loaders: Iterable[Server],
) -> list[str]:
    """A sentence for each loader of a format that will not take these linears, though one does.

    Raises ExportError if none of them does, and if nothing is quantized.
    """
    if not linears:
        raise ExportError("nothing in this model is quantized", "serve the source model's folder")
    refusals = {loader: _refusals(linears, form, loader) for loader in loaders}
    if all(refusals.values()):
        listed = "; ".join(f"{loader}: {'; '.join(why)}" for loader, why in refusals.items() if why)
        raise ExportError(
            f"no loader takes this model as {form}: {listed}",
            "compile with the scheme that is named, or save in panguq's own format",
        )
    return [
        f"{loader} will not load this checkpoint: {'; '.join(why)}"
        for loader, why in refusals.items()
        if why
    ]


def check_fused(graph: CheckpointGraph) -> None:
    """Raises ExportError for linears that read one tensor and differ in scheme: servers make one
    matmul of them, and want one scheme for it."""
    for paths in graph.fused:
        linears = [graph.quantized.get(path) for path in paths]
        kinds = {None if q is None else (q.scheme.weight, q.scheme.activation) for q in linears}
        if len(kinds) > 1:
            raise ExportError(
                f"{', '.join(paths)} read one tensor and differ in scheme: vLLM and vllm-ascend "
                "fuse them and refuse that",
                "let one glob of the recipe name them all",
            )


def _refusals(linears: Mapping[str, LinearForm], form: ServedFormat, loader: Server) -> list[str]:
    paths: dict[tuple[str, int | None, bool], list[str]] = defaultdict(list)
    for linear in linears.values():
        group = None if linear.group_size == linear.shape[1] else linear.group_size
        paths[linear.scheme.name, group, linear.is_expert].append(linear.path)
    found = []
    for (scheme, group, is_expert), same in paths.items():
        entry = support(loader, form, scheme, group, is_expert)
        if not entry.takes:
            more = f" and {len(same) - 1} more" if len(same) > 1 else ""
            found.append(f"{same[0]}{more} ({scheme}): {entry.reason}; choose {entry.instead}")
    heads = [path for path in linears if path.rpartition(".")[2] == "lm_head"]
    if heads and (loader, form) != ("transformers", "compressed-tensors"):
        found.append(
            f"{heads[0]}: it has quantized linears only, and this is its LM head; keep it FLOAT"
        )
    return found
