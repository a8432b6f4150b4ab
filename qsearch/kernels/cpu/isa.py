"""Instruction sets, and the few operations whose instructions differ between them.

Kernels are written over vectors of `Isa.lanes` 32-bit values. An instruction set says how wide a vector is,
which registers a tile may fill, and how integer products are summed. The base class says it with operations that
every machine has, in forms that LLVM turns into `pmaddwd` on any x86 from SSE2 to AVX512; the others call
instructions of their own. All are exact, with the same operands in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import tirx
from tvm.ir import Expr

__all__ = ["ISAS", "PORTABLE", "Isa"]


@dataclass(frozen=True)
class Isa:
    """What kernel generators know of an instruction set.

    Attributes:
        name: Name used in kernel identities and target descriptions.
        lanes: 32-bit lanes of a vector.
        registers: Vector registers a tile may occupy.
        architecture: Machine architecture, as in an LLVM triple; '' for any.
        features: LLVM feature names the generated code needs.
        activation_offset: `dot` multiplies by activations minus this: an accumulator must start with
            activation_offset * (sum of its weights).
        dot_group: Adjacent uint8 x int8 products that one dot step adds into a 32-bit lane.
    """

    name: str
    lanes: int
    registers: int
    architecture: str = ""
    features: tuple[str, ...] = ()
    activation_offset: int = 0
    dot_group: int = 4

    @property
    def permutes_bytes(self) -> bool:
        """True if `permute_bytes` is one instruction."""
        return "avx512vbmi" in self.features

    def dot(self, accumulator: Expr, activations: Expr, weights: Expr) -> Expr:
        """Add four uint8 x int8 products to every int32 lane, the same activations to all.

        Args:
            accumulator: int32 x lanes.
            activations: int32 scalar holding four uint8 values.
            weights: int8 x (4 * lanes).

        Returns:
            int32 x lanes.
        """
        spread, kind = tirx.Broadcast(activations, self.lanes), f"int16x{2 * self.lanes}"
        # Bytes are widened where they stand, even and odd ones apart, instead of being moved.
        shift, mask = _every(8, "int16", 2 * self.lanes), _every(0x00FF00FF, "int32", self.lanes)
        pairs = tirx.reinterpret(kind, weights)
        even = self._add_pairs(accumulator, tirx.reinterpret(kind, spread & mask), (pairs << shift) >> shift)
        unsigned = tirx.reinterpret(f"u{kind}", spread) >> _every(8, "uint16", 2 * self.lanes)
        return self._add_pairs(even, tirx.reinterpret(kind, unsigned), pairs >> shift)

    def dot_pairs(self, accumulator: Expr, activations: Expr, weights: Expr) -> Expr:
        """Add two int16 products to every int32 lane, the same activations to all.

        Args:
            accumulator: int32 x lanes; no sum on the way may exceed int32.
            activations: int32 scalar holding two int16 values.
            weights: int16 x (2 * lanes).

        Returns:
            int32 x lanes.
        """
        spread = tirx.reinterpret(f"int16x{2 * self.lanes}", tirx.Broadcast(activations, self.lanes))
        return self._add_pairs(accumulator, spread, weights)

    def multiply_add(self, kind: str, accumulator: Expr, a: Expr, b: Expr) -> Expr:
        """`accumulator + a * b` lane by lane, of dtype `kind`: float32, fused where the machine can; or int32.

        int32 operands fit 16 bits, and those of `a` are not negative.
        """
        if kind.startswith("float32"):
            return _llvm("llvm.fmuladd", kind, a, b, accumulator)
        # LLVM sees the operands being widened, and multiplies halves where that is cheaper.
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
        # The conversion instruction itself, under the default rounding mode.
        return _llvm("llvm.lrint", f"int32x{lanes}" if lanes > 1 else "int32", value)

    def _add_pairs(self, accumulator: Expr, a: Expr, b: Expr) -> Expr:
        """Add the products of two adjacent int16 to every int32 lane; a and b are int16 x (2 * lanes)."""
        wide = f"int32x{2 * self.lanes}"
        products = tirx.Cast(wide, a) * tirx.Cast(wide, b)
        # Widening products of which neighbours are added: LLVM knows this for vpmaddwd.
        return accumulator + (_alternate(products, 0, self.lanes) + _alternate(products, 1, self.lanes))


@dataclass(frozen=True)
class _Vnni(Isa):
    """Vector neural network instructions of x86: dot products with the sum in one instruction."""

    def dot(self, accumulator: Expr, activations: Expr, weights: Expr) -> Expr:
        """Add four products per lane with vpdpbusd."""
        operand = tirx.reinterpret(f"int8x{4 * self.lanes}", tirx.Broadcast(activations, self.lanes))
        return self._accumulate("vpdpbusd", accumulator, operand, weights)

    def multiply_add(self, kind: str, accumulator: Expr, a: Expr, b: Expr) -> Expr:
        """`accumulator + a * b`, of int32 in one instruction as well: vpdpwssd."""
        if kind != f"int32x{self.lanes}":
            return super().multiply_add(kind, accumulator, a, b)
        # a's upper half is zero, so the sum of the products of both halves is a * b.
        halves = (tirx.reinterpret(f"int16x{2 * self.lanes}", x) for x in (a, b))
        return self._add_pairs(accumulator, *halves)

    def _add_pairs(self, accumulator: Expr, a: Expr, b: Expr) -> Expr:
        return self._accumulate("vpdpwssd", accumulator, a, b)

    def _accumulate(self, instruction: str, accumulator: Expr, a: Expr, b: Expr) -> Expr:
        # Named after AVX512 at any width; LLVM chooses the VEX encoding where there is no AVX512.
        return _llvm(f"llvm.x86.avx512.{instruction}.{32 * self.lanes}", f"int32x{self.lanes}", accumulator, a, b)


@dataclass(frozen=True)
class _Neon(Isa):
    """AArch64's vectors of four lanes."""

    def round_to_int(self, value: Expr, lanes: int) -> Expr:
        """Round float32 x lanes half to even with fcvtns; |value| < 2**31."""
        if lanes != self.lanes:
            return super().round_to_int(value, lanes)
        return _llvm("llvm.aarch64.neon.fcvtns", f"int32x{lanes}", value)

    def _add_pairs(self, accumulator: Expr, a: Expr, b: Expr) -> Expr:
        # b is taken apart once for all activations, whose elements smlal can pick itself.
        for which in (0, 1):
            operands = (_alternate(x, which, self.lanes) for x in (a, b))
            accumulator = accumulator + _llvm("llvm.aarch64.neon.smull", f"int32x{self.lanes}", *operands)
        return accumulator


@dataclass(frozen=True)
class _NeonDot(_Neon):
    """AArch64 with dot products: usdot where there are 8-bit matrix instructions, else sdot of signed operands."""

    def dot(self, accumulator: Expr, activations: Expr, weights: Expr) -> Expr:
        """Add four products per lane; see `activation_offset`."""
        if self.activation_offset:
            # The top bit turned over makes a - 128 of an unsigned a.
            activations = activations ^ tirx.const(-0x7F7F7F80, "int32")
        operand = tirx.reinterpret(f"int8x{4 * self.lanes}", tirx.Broadcast(activations, self.lanes))
        instruction = "sdot" if self.activation_offset else "usdot"
        return _llvm(f"llvm.aarch64.neon.{instruction}", f"int32x{self.lanes}", accumulator, operand, weights)


def _llvm(name: str, dtype: str, *arguments: Expr) -> Expr:
    return tirx.call_llvm_pure_intrin(dtype, name, *arguments)


def _every(value: int, dtype: str, lanes: int) -> Expr:
    return tirx.Broadcast(tirx.const(value, dtype), lanes)


def _alternate(value: Expr, first: int, count: int) -> Expr:
    """`count` elements of a vector, every second one from `first`."""
    return tirx.Shuffle([value], [tirx.const(first + 2 * i, "int32") for i in range(count)])


# Without a dot instruction a step holds its operands twice, as even and odd bytes: where registers are few, some
# are left for that.
PORTABLE = Isa("portable", 4, 14)
_AVX2 = Isa("avx2", 8, 14, "x86_64", ("avx2", "fma"))
_AVX_VNNI = _Vnni("avxvnni", 8, 16, "x86_64", (*_AVX2.features, "avxvnni"))
_AVX512 = Isa("avx512", 16, 32, "x86_64", ("avx512f", "avx512bw", "avx512vl", "avx512dq"))
_AVX512_VNNI = _Vnni("avx512vnni", 16, 32, "x86_64", (*_AVX512.features, "avx512vnni"))
# Adds permutations of whole vectors of bytes: table lookups sixty-four at a time.
_AVX512_VBMI = replace(_AVX512_VNNI, name="avx512vbmi", features=(*_AVX512_VNNI.features, "avx512vbmi"))
_NEON = _Neon("neon", 4, 24, "aarch64", ("neon",))
_NEON_DOT = _NeonDot("neondot", 4, 32, "aarch64", ("neon", "dotprod"), activation_offset=128)
_NEON_I8MM = _NeonDot("neoni8mm", 4, 32, "aarch64", ("neon", "dotprod", "i8mm"))

# The first whose features the target has is used; the last needs none.
ISAS = (_AVX512_VBMI, _AVX512_VNNI, _AVX512, _AVX_VNNI, _AVX2, _NEON_I8MM, _NEON_DOT, _NEON, PORTABLE)
