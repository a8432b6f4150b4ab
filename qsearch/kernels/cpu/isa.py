"""Instruction sets, and the few operations whose instructions differ between them.

Kernels are written over vectors of `Isa.lanes` 32-bit values. An instruction set says how wide a vector is,
how many products one integer dot step sums, and which registers a tile may fill.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import tirx
from tvm.ir import Expr

__all__ = ["AVX512_VBMI", "AVX512_VNNI", "ISAS", "PORTABLE", "Isa"]


@dataclass(frozen=True)
class Isa:
    """What kernel generators know of an instruction set.

    Attributes:
        name: Name used in kernel identities and target descriptions.
        lanes: 32-bit lanes of a vector.
        registers: Vector registers a tile may occupy.
        dot_group: Adjacent uint8 x int8 products that one dot step adds into a 32-bit lane.
        features: LLVM feature names the generated code needs.
    """

    name: str
    lanes: int
    registers: int
    dot_group: int
    features: tuple[str, ...] = ()

    @property
    def permutes_bytes(self) -> bool:
        """True if `permute_bytes` is one instruction."""
        return "avx512vbmi" in self.features

    def dot(self, accumulator: Expr, activations: Expr, weights: Expr) -> Expr:
        """Add `dot_group` products to every int32 lane.

        Args:
            accumulator: int32 x lanes.
            activations: int32 scalar holding `dot_group` uint8 values (VNNI), or one uint8 scalar.
            weights: int8 x (lanes * dot_group).

        Returns:
            int32 x lanes.
        """
        spread = tirx.Broadcast(activations, self.lanes)
        if self.dot_group == 4:
            operand = tirx.reinterpret("int8x64", spread)
            return _llvm("llvm.x86.avx512.vpdpbusd.512", "int32x16", accumulator, operand, weights)
        kind = f"int32x{self.lanes}"
        return accumulator + tirx.Cast(kind, spread) * tirx.Cast(kind, weights)

    def multiply_add(self, kind: str, accumulator: Expr, a: Expr, b: Expr) -> Expr:
        """`accumulator + a * b` lane by lane, of dtype `kind`: float32 rounds once; int32 operands fit 16 bits."""
        if kind.startswith("float32"):
            return _llvm("llvm.fma", kind, a, b, accumulator)
        if self.dot_group == 4 and kind == "int32x16":
            # Both operands fit 16 bits and a's upper half is zero, so the pairwise product sum is a * b.
            pair_a, pair_b = (tirx.reinterpret("int16x32", x) for x in (a, b))
            return _llvm("llvm.x86.avx512.vpdpwssd.512", kind, accumulator, pair_a, pair_b)
        return accumulator + a * b

    def permute_bytes(self, low: Expr, indices: Expr, high: Expr) -> Expr:
        """Pick bytes of a 128-byte table by the low seven bits of 64 indices; only where `permutes_bytes`.

        Args:
            low: uint8 x 64, entries 0 to 63.
            indices: uint8 x 64.
            high: uint8 x 64, entries 64 to 127.
        """
        operands = (tirx.reinterpret("int8x64", operand) for operand in (low, indices, high))
        return tirx.reinterpret("uint8x64", _llvm("llvm.x86.avx512.vpermi2var.qi.512", "int8x64", *operands))

    def round_to_int(self, value: Expr, lanes: int) -> Expr:
        """Round float32 x lanes half to even; |value| < 2**31."""
        if self.lanes == 16 and lanes == 16:
            # vcvtps2dq under the default rounding mode (4 = current direction): one instruction, not two.
            unused = tirx.Broadcast(tirx.const(0, "int32"), 16)
            arguments = (value, unused, tirx.const(-1, "int16"), tirx.const(4, "int32"))
            return _llvm("llvm.x86.avx512.mask.cvtps2dq.512", "int32x16", *arguments)
        kind = f"x{lanes}" if lanes > 1 else ""
        return tirx.Cast(f"int32{kind}", _llvm("llvm.rint", f"float32{kind}", value))


AVX512_VNNI = Isa("avx512vnni", 16, 32, 4, ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"))
# Adds permutations of whole vectors of bytes: table lookups sixty-four at a time.
AVX512_VBMI = replace(AVX512_VNNI, name="avx512vbmi", features=(*AVX512_VNNI.features, "avx512vbmi"))
PORTABLE = Isa("portable", 8, 16, 1)

# The first whose features the target has is used; the last needs none.
ISAS = (AVX512_VBMI, AVX512_VNNI, PORTABLE)


def _llvm(name: str, dtype: str, *arguments: Expr) -> Expr:
    return tirx.call_llvm_pure_intrin(dtype, name, *arguments)
