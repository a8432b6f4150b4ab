"""The target of a search where its options say so in other ways than by naming it."""

from __future__ import annotations

from dataclasses import replace

from qsearch.errors import UsageError
from qsearch.measure.devices.cost_file import read_cost_file
from qsearch.measure.devices.rpc import parse_address
from qsearch.search.evaluation.evaluator import Settings

__all__ = ["named_target"]

# The target where the user names none.
UNNAMED = "llvm"


def named_target(settings: Settings) -> Settings:
    """The settings, whose target and threads are those of the cost table where there is one and no target was named.

    Raises:
        UsageError: The cost table cannot be read, or options contradict each other.
    """
    if settings.rpc is None and settings.rpc_key is not None:
        raise UsageError("--key is of a tracker: give --rpc HOST:PORT too")
    if settings.rpc is not None:
        if settings.cost_table is not None:
            raise UsageError("--rpc and --cost-table contradict each other: modules are timed on a device, or modelled")
        parse_address(settings.rpc, settings.rpc_key)
        if settings.target == UNNAMED:
            raise UsageError("--rpc needs --target: the CPU of the device, such as aarch64:neoverse-n1, or portable")
    if settings.cost_table is None or settings.target != UNNAMED:
        return settings
    table = read_cost_file(settings.cost_table)
    return replace(settings, target=str(table.target["name"]), threads=int(table.target["threads"]))
