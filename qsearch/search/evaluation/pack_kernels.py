"""From a model and a search space to a pack of the kernels that its configurations need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qsearch.build.link import Linker
from qsearch.build.object_cache import cache_for
from qsearch.build.target import open_target
from qsearch.measure.devices.pack import PackRequest, write_pack
from qsearch.search.bound_space import bind_space
from qsearch.search.evaluation.evaluator import Progress, Settings
from qsearch.search.evaluation.objective import prepare_for
from qsearch.search.evaluation.requirements import require_room
from qsearch.search.space import SearchSpace
from qsearch.search.tables.needed_kernels import needed_programs

__all__ = ["pack_kernels"]


def pack_kernels(settings: Settings, space: SearchSpace, out: Path, tiles: int, progress: Progress) -> dict[str, Any]:
    """Write a pack.

    Args:
        settings: Model, images (ranges of activations are of them) and target, which need not run here.
        space: Its kernels are packed.
        out: The file.
        tiles: Register tiles of every dense convolution.
        progress: Called whenever a slow step begins.

    Returns:
        target (in words), kernels, bytes, left_out.

    Raises:
        UsageError: The model, the images or the target cannot be used, or the file cannot be written.
        BuildError, ToolchainError: As `write_pack`.
    """
    target = open_target(settings.target, settings.threads)
    evaluator = prepare_for(settings, target, progress)
    require_room(settings.cache_dir)
    linker = Linker(cache_for(settings.cache_dir / "kernels", target))
    evaluator.linker = linker
    bound = bind_space(evaluator.profile.space(space), evaluator.graph)
    programs = needed_programs(evaluator, bound, progress)
    found = write_pack(PackRequest(settings.model, linker, programs, tiles), out, progress)
    return {"target": target.description, **found}
