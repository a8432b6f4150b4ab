"""The device that a search is for where it is not this machine."""

from __future__ import annotations

from qsearch.build.target import Target, open_target
from qsearch.measure.devices.cost_file import read_cost_file
from qsearch.measure.devices.device import Away
from qsearch.measure.devices.modelled import PackAway
from qsearch.measure.devices.rpc import parse_address
from qsearch.measure.devices.rpc_away import RpcAway
from qsearch.search.evaluation.evaluator import Settings
from qsearch.search.evaluation.requirements import open_local_target

__all__ = ["open_away", "open_target_of"]


def open_target_of(settings: Settings) -> Target:
    """What is compiled for, known to run here unless modules are timed elsewhere.

    Raises:
        UsageError: The target cannot be used.
    """
    if settings.cost_table is None and settings.rpc is None:
        return open_local_target(settings.target, settings.threads)
    return open_target(settings.target, settings.threads)


def open_away(settings: Settings, target: Target) -> Away | None:
    """The device that settings name; None for this machine.

    Raises:
        UsageError: It cannot be used.
    """
    kernels = settings.cache_dir / "kernels"
    if settings.rpc is not None:
        return RpcAway(parse_address(settings.rpc, settings.rpc_key), target, kernels)
    return None if settings.cost_table is None else PackAway(read_cost_file(settings.cost_table), target, kernels)
