"""Gather tiles of a convolution's input into shared memory, row by row as the product of matrices wants them."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.conv_layout import UNIT_WORDS, Place, divided, kept, swizzle_of, xor
from qsearch.kernels.cuda.conv_plan import ConvPlan
from qsearch.kernels.cuda.device import perform
from qsearch.kernels.cuda.epilogue import Arguments
from qsearch.kernels.cuda.simt import at, constant, converted, load, registers, store

__all__ = ["ConvSource"]


@dataclass(frozen=True)
class _Tap:
    """An element of the contraction.

    Attributes:
        product: Its number.
        row: Rows between its tap and the first.
        column: Columns likewise.
        offset: Elements likewise, and its channel.
    """

    product: Expr
    row: Expr | int
    column: Expr | int
    offset: Expr


class ConvSource:
    """A thread's part in gathering: the same columns of every `stride`-th row of the tile.

    Args:
        plan: The kernel.
        buffer: The input.
        arguments: The kernel's scalars.
        place: The thread.
    """

    def __init__(self, plan: ConvPlan, buffer: tirx.Buffer, arguments: Arguments, place: Place) -> None:
        self.plan, self.buffer, self.thread = plan, buffer, place.thread
        self.moves = plan.tile.depth // plan.move_bytes
        self.stride = plan.tile.threads // self.moves
        self.count = -(-plan.tile.rows // self.stride)
        self.row, self.column = kept(place.thread // self.moves), kept(place.thread % self.moves)
        self.fill = self._fill(arguments)
        self.bases, self.ys, self.xs = (registers(self.count, "int32") for _ in range(3))
        for i in range(self.count):
            self._locate(i, place)

    def _fill(self, arguments: Arguments) -> Expr:
        """The word that padding is made of."""
        zero = constant(0, "int32")
        if self.plan.dtypes[0] != "uint8" or not any(self.plan.outside):
            return zero
        # Unsigned: a signed product that leaves its range is undefined.
        spread = converted(arguments.integer("a_zero_point"), "uint32") * constant(0x01010101, "uint32")
        return kept(converted(spread, "int32"))

    def _locate(self, i: int, place: Place) -> None:
        """Where the first tap of the thread's i-th pixel lies; pixels beyond the last are the last."""
        plan, conv = self.plan, self.plan.key.conv
        (_, height, width, channels), (_, rows, columns, _) = plan.key.shapes[0], plan.key.shapes[-1]
        pixel = place.row_tile * plan.tile.rows + self.row + i * self.stride
        if plan.pixels % plan.tile.rows or self.count * self.stride > plan.tile.rows:
            pixel = tirx.min(pixel, plan.pixels - 1)
        pixel = kept(pixel)
        if (height, width) == (rows, columns) and plan.taps == 1 and not any(plan.outside):
            store(self.bases, i, pixel * channels + place.group * plan.in_channels)
            return
        image, pixel = (kept(x) for x in divided(pixel, rows * columns))
        y, x = divided(pixel, columns)
        store(self.ys, i, y * conv.stride[0] - conv.padding[0])
        store(self.xs, i, x * conv.stride[1] - conv.padding[1])
        base = ((image * height + load(self.ys, i)) * width + load(self.xs, i)) * channels + place.group * plan.in_channels
        store(self.bases, i, base)

    def fetch(self, shared: tirx.Buffer, step: Expr | int, slot: Expr | int) -> None:
        """Begin to bring a step's pixels into words `slot` onwards of shared memory.

        Args:
            shared: Words.
            step: Step of the pipeline.
            slot: First word.
        """
        plan = self.plan
        units, words = plan.tile.depth // 16, plan.move_bytes // 4
        each = plan.move_bytes // plan.itemsize
        first = step * plan.step_products + self.column * each
        taps = [self._tap(first + e) for e in range(each if not plan.copy_bytes else 1)]
        unit, within = self.column * words // UNIT_WORDS, self.column * words % UNIT_WORDS
        for i in range(self.count):
            row = self.row + i * self.stride
            to = slot + row * (units * UNIT_WORDS) + xor(unit, swizzle_of(row, units)) * UNIT_WORDS + within
            move = self._copy if plan.copy_bytes else self._assemble
            if (i + 1) * self.stride > plan.tile.rows:
                with T.If(row < plan.tile.rows), T.Then():
                    move(i, at(shared, to), taps)
            else:
                move(i, at(shared, to), taps)

    def _tap(self, product: Expr) -> _Tap:
        plan, conv = self.plan, self.plan.key.conv
        _, _, width, channels = plan.key.shapes[0]
        product = kept(product)
        if plan.taps == 1:
            return _Tap(product, 0, 0, product)
        tap, channel = (kept(x) for x in divided(product, plan.run))
        row, column = divided(tap, conv.kernel[1])
        row, column = kept(row * conv.dilation[0]), kept(column * conv.dilation[1])
        return _Tap(product, row, column, kept((row * width + column) * channels + channel))

    def _copy(self, i: int, to: Expr, taps: list[_Tap]) -> None:
        size, tap = self.plan.copy_bytes, taps[0]
        inside = self._inside(i, tap)
        # Taps that follow one another read mostly the same pixels. Smaller copies go through the first cache anyway.
        name = "qs_copy_cached_16" if size == 16 and self.plan.taps > 1 else f"qs_copy_{size}"
        copy = lambda: perform(name, to, at(self.buffer, load(self.bases, i) + tap.offset))  # noqa: E731
        if inside is None:
            copy()
            return
        with T.If(inside):
            with T.Then():
                copy()
            with T.Else():
                perform(f"qs_fill_{size}", to, self._padding(tap))

    def _padding(self, tap: _Tap) -> Expr:
        """What lies outside: the zero point within the contraction, zero beyond its end."""
        known = self._is_product(tap)
        return self.fill if known is None else tirx.Select(known, self.fill, constant(0, "int32"))

    def _assemble(self, i: int, to: Expr, taps: list[_Tap]) -> None:
        """A word of elements that no copy fits, loaded one by one."""
        dtype = self.plan.dtypes[0]
        word = registers(len(taps), dtype)
        for e, tap in enumerate(taps):
            inside, padding = self._inside(i, tap), constant(0, dtype)
            if dtype == "uint8":
                padding = converted(tirx.bitwise_and(self._padding(tap), constant(255, "int32")), dtype)
            element = load(self.buffer, load(self.bases, i) + tap.offset)
            store(word, e, element if inside is None else tirx.if_then_else(inside, element, padding))
        perform("qs_put_4", to, at(word, 0))

    def _is_product(self, tap: _Tap) -> Expr | None:
        """Whether an element belongs to the contraction; None where all do."""
        plan, tests = self.plan, []
        if plan.products % plan.step_products:
            tests.append(tap.product < plan.products)
        if plan.run != plan.in_channels:
            tests.append(tap.product % plan.run < plan.in_channels)
        return tirx.all(*tests) if tests else None

    def _inside(self, i: int, tap: _Tap) -> Expr | None:
        """Whether an element exists; None where all do."""
        _, height, width, _ = self.plan.key.shapes[0]
        known = self._is_product(tap)
        tests = [] if known is None else [known]
        # As unsigned numbers those before the image are beyond its end.
        if self.plan.outside[0]:
            tests.append(converted(load(self.ys, i) + tap.row, "uint32") < constant(height, "uint32"))
        if self.plan.outside[1]:
            tests.append(converted(load(self.xs, i) + tap.column, "uint32") < constant(width, "uint32"))
        return tirx.all(*tests) if tests else None
