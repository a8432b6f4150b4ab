"""The device that a search is for where it is not this machine."""

from __future__ import annotations

from dataclasses import replace

from qsearch.build.target import Target, open_target
from qsearch.measure.devices.cost_file import read_cost_file
from qsearch.measure.devices.device import Away
from qsearch.measure.devices.modelled import PackAway
from qsearch.search.evaluation.evaluator import Settings
from qsearch.search.evaluation.requirements import open_local_target

__all__ = ["UNNAMED", "named_target", "open_away", "open_target_of"]

# Names of the target where the user gives none.
UNNAMED = ("llvm", "host", "cpu")


def named_target(settings: Settings) -> Settings:
    """The settings, whose target and threads are those of the cost table where there is one and no target was named.

    Raises:
        UsageError: The cost table cannot be read.
    """
    if settings.cost_table is None or settings.target not in UNNAMED:
        return settings
    table = read_cost_file(settings.cost_table)
    return replace(settings, target=str(table.target["name"]), threads=int(table.target["threads"]))


def open_target_of(settings: Settings) -> Target:
    """What is compiled for, known to run here unless modules are timed elsewhere.

    Raises:
        UsageError: The target cannot be used.
    """
    if settings.cost_table is None:
        return open_local_target(settings.target, settings.threads)
    return open_target(settings.target, settings.threads)


def open_away(settings: Settings, target: Target) -> Away | None:
    """The device that settings name; None for this machine.

    Raises:
        UsageError: It cannot be used.
    """
    if settings.cost_table is None:
        return None
    return PackAway(read_cost_file(settings.cost_table), target, settings.cache_dir / "kernels")
