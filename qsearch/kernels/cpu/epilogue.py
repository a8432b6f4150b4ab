"""What happens to an accumulated value before it is stored; shared by every kernel that computes in float."""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr

from qsearch.kernels.cpu.isa import Isa
from qsearch.kernels.cpu.vectors import cast, rounded_product, splat, store
from qsearch.kernels.prim_func import Arguments, declare_arguments

__all__ = ["Arguments", "declare_arguments", "dequantized", "finish", "finished"]


def dequantized(value: Expr, dtype: str, lanes: int, arguments: Arguments, which: str) -> Expr:
    """f32(f32(value - zero_point) * multiplier), or f32(value * multiplier) for float values.

    Args:
        value: uint8, int16 or float32 x lanes.
        dtype: 'uint8', 'int16' or 'float32'.
        lanes: Number of lanes.
        arguments: The kernel's scalars.
        which: 'a' or 'b': whose zero point and multiplier.
    """
    if dtype != "float32":
        centred = cast(value, "int32", lanes) - splat(arguments.integer(f"{which}_zero_point"), lanes)
        value = cast(centred, "float32", lanes)
    return rounded_product(value, splat(arguments.float(f"{which}_multiplier"), lanes), lanes)


def finish(isa: Isa, buffer: tirx.Buffer, index: Expr, value: Expr, lanes: int, arguments: Arguments, clipped: bool) -> None:
    """Clip, round and store a float32 value, see `finished`."""
    store(buffer, index, finished(isa, str(buffer.dtype), value, lanes, arguments, clipped), lanes)


def finished(isa: Isa, dtype: str, value: Expr, lanes: int, arguments: Arguments, clipped: bool) -> Expr:
    """Clip and round a float32 value.

    For an integer buffer: clip(rint(value) + zero_point, qmin, qmax); the clip comes first, in float, which gives
    the same integers because its bounds are integers, and keeps the conversion to int32 from overflowing.
    For a float32 buffer: clip(value, low, high) where `clipped`, else value.
    """
    if dtype != "float32":
        zero_point = arguments.integer("zero_point")
        bounds = (tirx.Cast("float32", arguments.integer(name) - zero_point) for name in ("qmin", "qmax"))
        low, high = (splat(bound, lanes) for bound in bounds)
        whole = isa.round_to_int(tirx.min(tirx.max(value, low), high), lanes)
        return cast(whole + splat(zero_point, lanes), dtype, lanes)
    if clipped:
        low, high = (splat(arguments.float(name), lanes) for name in ("low", "high"))
        value = tirx.min(tirx.max(value, low), high)
    return value
