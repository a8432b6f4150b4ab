"""Whole vectors of bytes on x86: interleave four of them, dot them, narrow results back, in 128, 256 or 512 bits.

The order of lanes is that of the instructions: an interleave works within 128-bit lanes, and narrowing undoes
exactly what it did. Between the two, vector v of four holds channel 16 l + 4 v + i in its 32-bit lane 4 l + i.
"""

from __future__ import annotations

import numpy as np
from tvm import tirx
from tvm.ir import Expr

__all__ = [
    "channel_order",
    "dot_quads",
    "interleave",
    "narrow_to_bytes",
    "narrow_to_words",
    "round_lanes",
    "transpose_quarters",
]

_PACKS = {64: "llvm.x86.avx512.{}.512", 32: "llvm.x86.avx2.{}", 16: "llvm.x86.sse2.{}.128"}


def channel_order(width: int) -> np.ndarray:
    """The channel held by every 32-bit lane of the four vectors: (4, width / 4) indices into `width` channels."""
    lane, i = np.divmod(np.arange(width // 4), 4)
    return np.stack([16 * lane + 4 * v + i for v in range(4)])


def interleave(rows: list[Expr], width: int) -> list[Expr]:
    """Bring the same channel of four rows together.

    Args:
        rows: Four vectors of uint8 x width.
        width: Bytes of a vector: 64, 32 or 16.

    Returns:
        Four vectors of uint8 x width; each 32-bit lane holds one channel of rows 0, 1, 2, 3.
    """
    first = [_unpack(rows[0], rows[1], width, 1, half) for half in (0, 1)]
    second = [_unpack(rows[2], rows[3], width, 1, half) for half in (0, 1)]
    return [_unpack(first[half], second[half], width, 2, quarter) for half in (0, 1) for quarter in (0, 1)]


def _unpack(a: Expr, b: Expr, width: int, size: int, half: int) -> Expr:
    """Alternate elements of `size` bytes from the low or high halves of every 128-bit lane."""
    order = []
    for lane in range(0, width, 16):
        for element in range(8 // size):
            start = lane + 8 * half + element * size
            order += [start + byte for byte in range(size)] + [width + start + byte for byte in range(size)]
    return tirx.Shuffle([a, b], [tirx.const(i, "int32") for i in order])


def dot_quads(accumulator: Expr, activations: Expr, weights: Expr, width: int) -> Expr:
    """Add four uint8 x int8 products to every int32 lane.

    Args:
        accumulator: int32 x width / 4.
        activations: uint8 x width.
        weights: int8 x width.
        width: Bytes of a vector.
    """
    operands = (tirx.reinterpret(f"int8x{width}", activations), weights)
    return _call(f"llvm.x86.avx512.vpdpbusd.{8 * width}", f"int32x{width // 4}", accumulator, *operands)


def round_lanes(value: Expr, width: int) -> Expr:
    """float32 x width / 4 -> int32, half to even: the conversion itself under the default rounding mode."""
    kind = f"int32x{width // 4}"
    if width == 64:
        unused = tirx.Broadcast(tirx.const(0, "int32"), 16)
        return _call("llvm.x86.avx512.mask.cvtps2dq.512", kind, value, unused, tirx.const(-1, "int16"), tirx.const(4, "int32"))
    return _call("llvm.x86.avx.cvt.ps2dq.256" if width == 32 else "llvm.x86.sse2.cvtps2dq", kind, value)


def narrow_to_words(a: Expr, b: Expr, zero_point: Expr, width: int) -> Expr:
    """Value + zero_point of two vectors of int32 x width / 4, saturated to int16 x width / 2.

    Saturation to 16 and then to 8 bits is the clip to 0..255: it keeps every value's side of both bounds.

    Args:
        a: First vector.
        b: Second vector; its lanes follow those of `a` within each 128 bits.
        zero_point: int16 scalar in 0 to 255.
        width: Bytes of a vector.
    """
    packed = _call(_PACKS[width].format("packssdw"), f"int16x{width // 2}", a, b)
    return _call("llvm.sadd.sat", f"int16x{width // 2}", packed, tirx.Broadcast(zero_point, width // 2))


def narrow_to_bytes(a: Expr, b: Expr, width: int) -> Expr:
    """Two vectors of int16 x width / 2, clipped to 0..255, as uint8 x width in the order before `interleave`."""
    return tirx.reinterpret(f"uint8x{width}", _call(_PACKS[width].format("packuswb"), f"int8x{width}", a, b))


def transpose_quarters(value: Expr) -> Expr:
    """From the lane order of `narrow_to_bytes` to vector after vector: uint8 x 64, 16 bytes of each of four vectors."""
    order = [16 * lane + 4 * v + byte for v in range(4) for lane in range(4) for byte in range(4)]
    return tirx.Shuffle([value], [tirx.const(i, "int32") for i in order])


def _call(name: str, dtype: str, *arguments: Expr) -> Expr:
    return tirx.call_llvm_pure_intrin(dtype, name, *arguments)
