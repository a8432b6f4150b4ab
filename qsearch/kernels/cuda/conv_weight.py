"""A convolution's weights: their order in global memory, their way into shared memory, 4-bit ones unpacked."""

from __future__ import annotations

import numpy as np
from tvm import tirx
from tvm.ir import Expr

from qsearch.kernels.cuda.conv_layout import UNIT_WORDS, Place, divided, each, kept, swizzle, swizzle_of, xor
from qsearch.kernels.cuda.conv_plan import ConvPlan
from qsearch.kernels.cuda.device import perform
from qsearch.kernels.cuda.simt import at, constant, converted, load, move, registers, store
from qsearch.quantize.group_scales import group_integers

__all__ = ["ConvWeight", "pack_constants", "pack_weight"]


def pack_weight(plan: ConvPlan, constants: dict[str, np.ndarray]) -> np.ndarray:
    """Lay weights out in the order a kernel reads them: group, tile of columns, step, column, unit, element.

    A step's weights lie together as they will in shared memory, so that copying them needs no arithmetic. 4-bit weights
    take half of that: of eight that follow one another, the first four are the low halves of four bytes, each plus
    eight. Their scales, two to a byte, and their offsets come last.

    Args:
        plan: The kernel.
        constants: With weight (O, kh, kw, I/groups), and what its groups have.

    Returns:
        Flat array, zero where there is no weight.
    """
    weight, tables = constants["weight"], []
    if plan.grouped:
        scale, offset = constants.get("group_scale"), constants.get("group_offset")
        weight = group_integers(weight, scale, offset, plan.key.weight_group)
        tables = _pack_tables(plan, scale, offset)
    tile, groups = plan.tile, plan.key.conv.groups
    dense = np.zeros((groups, plan.packed_columns, plan.taps, plan.run), weight.dtype)
    dense[:, : plan.out_channels, :, : plan.in_channels] = weight.reshape(groups, plan.out_channels, plan.taps, -1)
    steps = np.zeros((*dense.shape[:2], plan.steps * plan.step_products), weight.dtype)
    steps[..., : plan.products] = dense.reshape(*dense.shape[:2], -1)
    tiles = steps.reshape(groups, plan.column_tiles, tile.columns, plan.steps, plan.step_products).transpose(0, 1, 3, 2, 4)
    if plan.nibbles:
        eights = (tiles + 8).astype(np.uint8).reshape(-1, 2, 4)
        packed = (eights[:, 0] | eights[:, 1] << 4).view(np.int8).ravel()
        return np.concatenate([packed, *tables])
    units = tile.depth // 16
    columns = np.arange(tile.columns)
    order = np.stack([np.arange(units) ^ swizzle(column, units) for column in range(tile.columns)])
    split = tiles.reshape(*tiles.shape[:4], units, -1)
    return np.ascontiguousarray(split[..., columns[:, None], order, :]).ravel()


def _pack_tables(plan: ConvPlan, scale: np.ndarray | None, offset: np.ndarray | None) -> list[np.ndarray]:
    tables = []
    for table in (scale if plan.key.weight_group else None, offset if plan.key.weight_offset else None):
        if table is None:
            continue
        rows = np.zeros((plan.key.conv.groups, plan.packed_columns, plan.entries), table.dtype)
        rows[:, : plan.out_channels] = table.reshape(plan.key.conv.groups, plan.out_channels, plan.entries)
        flat = rows.ravel()
        if table is scale:
            flat = np.concatenate([flat, np.zeros(flat.size % 2, flat.dtype)])
            flat = flat[0::2] | flat[1::2] << 4
        tables.append(flat.view(np.int8))
    return tables


def pack_constants(plan: ConvPlan, constants: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """What every output channel has, filled up to whole tiles; then the scalars."""
    names = ("bias", *(("multiplier",) if plan.scaled else ()), *(("clip_high",) if plan.key.clips_channels else ()))
    rows = []
    for name in names:
        row = np.zeros((plan.key.conv.groups, plan.packed_columns), constants[name].dtype)
        row[:, : plan.out_channels] = constants[name].reshape(plan.key.conv.groups, -1)
        rows.append(row.ravel())
    return (*rows, constants["integers"], constants["floats"])


class ConvWeight:
    """A thread's part in fetching a block's weights.

    Args:
        plan: The kernel.
        buffer: The packed weight.
        place: The thread.
    """

    def __init__(self, plan: ConvPlan, buffer: tirx.Buffer, place: Place) -> None:
        self.plan, self.buffer, self.thread, self.place = plan, buffer, place.thread, place
        self.first = kept((place.group * plan.column_tiles + place.column_tile) * (plan.steps * plan.packed_words))

    def fetch(self, shared: tirx.Buffer, step: Expr | int, slot: Expr | int) -> None:
        """Begin to bring a step's weights into words `slot` onwards of shared memory."""
        plan = self.plan
        elements = UNIT_WORDS * 4 // (1 if plan.nibbles else plan.itemsize)
        first = (self.first + step * plan.packed_words) * (elements // UNIT_WORDS)

        def copy(unit: Expr, _: int) -> None:
            perform("qs_copy_16", at(shared, slot + unit * UNIT_WORDS), at(self.buffer, first + unit * elements))

        each(plan.packed_words // UNIT_WORDS, plan.tile.threads, self.thread, copy)

    def unpack(self, shared: tirx.Buffer, step: Expr | int, slot: Expr | int, to: tirx.Buffer) -> None:
        """Unpack a step's 4-bit weights, eight at a time, from words `slot` onwards into a buffer of their own.

        In the same buffer TVM would see every thread read what others may have written, and put barriers between.
        """
        plan = self.plan
        across, units = plan.tile.depth // 8, plan.tile.depth // 16

        def eight(index: Expr, _: int) -> None:
            column, part = kept(index // across), kept(index % across)
            packed = kept(load(shared, slot + index))
            both = registers(2, "int32")
            first = step * plan.step_products + part * 8
            for half in range(2):
                bits = tirx.bitwise_and(tirx.shift_right(packed, constant(4 * half, "int32")), constant(0x0F0F0F0F, "int32"))
                store(both, half, self._widened(bits, column, first + 4 * half))
            place = column * (plan.tile.depth // 4) + xor(part // 2, swizzle_of(column, units)) * UNIT_WORDS + part % 2 * 2
            move(to, place, both, 0, 2)

        each(plan.packed_words, plan.tile.threads, self.thread, eight)

    def _widened(self, bits: Expr, column: Expr, product: Expr) -> Expr:
        """Four bytes in 0 .. 15, weights plus eight -> four weights, int32."""
        bits = converted(bits, "uint32")
        if not self.plan.grouped:
            # No sum leaves its byte: 0x78 + 15 = 0x87.
            return converted(xor(bits + constant(0x78787878, "uint32"), constant(0x80808080, "uint32")), "int32")
        scale, offset = self._tables(column, product)
        # Nor does a product: 15 * 15 = 225.
        products = bits if scale is None else bits * converted(scale, "uint32")
        offset = offset - 8 * (1 if scale is None else scale)
        spread = converted(tirx.bitwise_and(offset, constant(255, "int32")), "uint32") * constant(0x01010101, "uint32")
        return converted(_add_bytes(kept_as(products), kept_as(spread)), "int32")

    def _tables(self, column: Expr, product: Expr) -> tuple[Expr | None, Expr]:
        """Scale and offset of a weight's group, int32."""
        plan, size = self.plan, self.plan.key.weight_group
        scales, offsets, _ = plan.tables_at
        number = (self.place.group * plan.packed_columns + self.place.column_tile * plan.tile.columns + column) * plan.entries
        if size:
            # What only fills the last step up is multiplied by zeros, whatever it is.
            product = tirx.min(product, plan.products - 1)
            tap, channel = divided(kept(product), plan.run)
            number = number + tap * (plan.entries // plan.taps) + divided(kept(channel), size)[0]
        number = kept(number)
        scale = None
        if size:
            byte = converted(load(self.buffer, scales + number // 2), "int32")
            scale = kept(tirx.bitwise_and(tirx.shift_right(byte, number % 2 * 4), constant(15, "int32")))
        offset = converted(load(self.buffer, offsets + number), "int32") if plan.key.weight_offset else constant(0, "int32")
        return scale, offset


def kept_as(value: Expr, dtype: str = "uint32") -> Expr:
    """A value kept in a register of a dtype."""
    place = registers(1, dtype)
    store(place, 0, value)
    return load(place, 0)


def _add_bytes(a: Expr, b: Expr) -> Expr:
    """Sums of four bytes each, none of which carries into the next."""
    low, high = constant(0x7F7F7F7F, "uint32"), constant(0x80808080, "uint32")
    carried = tirx.bitwise_and(a, low) + tirx.bitwise_and(b, low)
    return tirx.bitwise_xor(carried, tirx.bitwise_and(tirx.bitwise_xor(a, b), high))
