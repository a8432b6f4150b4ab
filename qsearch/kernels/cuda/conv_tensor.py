"""Convolutions and linear layers, most on the matrix units: tiles in shared memory, filled by copies that run ahead.

A block goes through the contraction in steps. While it multiplies one, the copies of those to come are under way
(Kerr et al., CUTLASS: Fast Linear Algebra in CUDA C++, 2017; copies that need no registers since compute capability 8.0).
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.conv_finish import declare_buffers, finish
from qsearch.kernels.cuda.conv_layout import Place, divided, kept
from qsearch.kernels.cuda.conv_plan import LAYER_PRECISIONS, ConvPlan
from qsearch.kernels.cuda.conv_source import ConvSource
from qsearch.kernels.cuda.conv_units import MatrixUnits, ScalarUnits, Units
from qsearch.kernels.cuda.conv_weight import ConvWeight, pack_constants, pack_weight
from qsearch.kernels.cuda.device import perform
from qsearch.kernels.cuda.simt import grid, kernel, sync
from qsearch.kernels.cuda.simt import shared as memory
from qsearch.kernels.cuda.tile import Tile
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["candidate_tiles", "conv2d", "conv2d_kernel"]


def conv2d(key: OpKey, arch: str) -> Kernel | None:
    """Describe the kernel of a convolution, or None for another operation.

    Args:
        key: kind 'conv2d'; shapes ((N, H, W, C), [(N, OH, OW, O) residual], (N, OH, OW, O)).
        arch: Such as 'sm_90'.
    """
    if key.kind != "conv2d" or key.precision not in LAYER_PRECISIONS or _depthwise(key):
        return None
    return conv2d_kernel(ConvPlan(key, arch))


def _depthwise(key: OpKey) -> bool:
    return key.conv.groups > 1 and key.conv.groups == key.shapes[0][3] == key.shapes[-1][3]


def candidate_tiles(key: OpKey, arch: str, count: int) -> list[Tile]:
    """Tiles worth timing for an operation, the predicted best first; none where there is nothing to choose.

    Of tiles that differ only in how warps and stages share the work, the two with the least predicted time.
    """
    if conv2d(key, arch) is None:
        return []
    found: list[Tile] = []
    for tile in ConvPlan(key, arch).candidates:
        if len(found) == count:
            break
        if sum((tile.rows, tile.columns) == (other.rows, other.columns) for other in found) < 2:
            found.append(tile)
    return found


def conv2d_kernel(plan: ConvPlan) -> Kernel:
    """The kernel of a plan."""
    return Kernel(
        plan.key,
        (plan.arch, plan.key.precision, plan.tile),
        lambda symbol: kernel(symbol, lambda: _generate(plan)),
        lambda constants: pack_constants(plan, constants),
        0,
        lambda constants: pack_weight(plan, constants),
    )


def _generate(plan: ConvPlan) -> None:
    buffers = declare_buffers(plan)
    with grid(plan.blocks, plan.tile.threads) as (block, thread):
        # Blocks that run at a time share pixels rather than weights: of those there are fewer.
        tile, column_tile = (kept(x) for x in divided(block, plan.column_tiles))
        group, row_tile = divided(tile, plan.row_tiles) if plan.key.conv.groups > 1 else (0, tile)
        place = Place(group if isinstance(group, int) else kept(group), kept(row_tile), column_tile, thread)
        words = memory(plan.shared_words, plan.dtypes[2])
        units: Units = (MatrixUnits if plan.matrix else ScalarUnits)(plan, place, buffers.bias)
        source = ConvSource(plan, buffers.source, buffers.arguments, place)
        _Pipeline(plan, words, source, ConvWeight(plan, buffers.weight, place), units).run()
        finish(plan, buffers, units, words, place)


class _Pipeline:
    """The loop over the contraction."""

    def __init__(self, plan: ConvPlan, shared: tirx.Buffer, source: ConvSource, weight: ConvWeight, units: Units) -> None:
        self.plan, self.shared, self.source, self.weight, self.units = plan, shared, source, weight, units
        self.unpacked = memory(plan.weight_words, "int32") if plan.nibbles else None

    def run(self) -> None:
        """Fetch the first steps; then wait for one, begin to fetch another, multiply.

        The barrier that shows all threads what arrived also tells that the slot to fetch into has been multiplied.
        """
        plan, ahead = self.plan, min(self.plan.tile.stages - 1, self.plan.steps)

        def begin(step: Expr | int) -> None:
            self._fetch(step)
            perform("qs_copies_commit")

        if ahead == 1:
            begin(0)
        else:
            with T.serial(0, ahead) as step:
                begin(step)

        def body(step: Expr | int) -> None:
            perform(f"qs_copies_wait_{ahead - 1}")
            sync()
            if plan.steps > ahead:
                with T.If(step + ahead < plan.steps), T.Then():
                    self._fetch(step + ahead)
            # Groups are counted, so that the last steps commit empty ones.
            perform("qs_copies_commit")
            self._multiply(step)

        if plan.steps == 1:
            body(0)
        else:
            with T.serial(0, plan.steps) as step:
                body(step)

    def _slot(self, step: Expr | int) -> Expr | int:
        """First word of a step's place."""
        return step % self.plan.slots * self.plan.slot_words

    def _fetch(self, step: Expr | int) -> None:
        slot = self._slot(step) if isinstance(step, int) else kept(self._slot(step))
        self.source.fetch(self.shared, step, slot)
        self.weight.fetch(self.shared, step, slot + self.plan.source_words)

    def _multiply(self, step: Expr | int) -> None:
        plan = self.plan
        slot = self._slot(step) if isinstance(step, int) else kept(self._slot(step))
        weights, weight = self.shared, slot + plan.source_words
        if self.unpacked is not None:
            self.weight.unpack(self.shared, step, weight, self.unpacked)
            sync()
            weights, weight = self.unpacked, 0
        self.units.multiply((self.shared, slot), (weights, weight))
