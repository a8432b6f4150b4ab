"""The integer program: a model under one configuration, every operation with its exact arithmetic.

Lowering writes it, the NumPy reference executes it, kernels implement it operation by operation. Values are
held channels-last: an image value of logical shape (N, C, H, W) lies in memory as (N, H, W, C); feature
values (N, F) lie as they are. A value is 'uint8', 'int16', 'float8_e4m3fn', 'float16' or 'float32'; the zero point of an
int16 value is 0, a float8 value has a scale alone, a float16 value neither scale nor zero point.

Arithmetic (one definition for every target; f32(.) rounds to float32, rint rounds half to even; a, b, q and r
are uint8 or int16 unless it says otherwise):

    quantize     q = clip(rint(f32(x * inv_scale)) + zero_point, qmin, qmax)
    dequantize   x = f32(f32(q - zero_point) * scale)
    requantize   q = clip(rint(f32(f32(a - a_zp) * m)) + zero_point, qmin, qmax)
    conv, integer (int16: a and w int16; int8: a uint8, w int8; w4a8: as int8, w in -8..7 or in groups, see below)
                 acc = bias + sum (a * w) over int32, padded positions hold a = input zero point
                 v   = f32(f32(acc) * multiplier[o])
                 v   = f32(v + f32(f32(r - r_zero_point) * r_multiplier))          with an integer residual r
                 v   = f32(v + f32(r * r_multiplier))                              with a residual, r float32
                 v   = min(v, clip_high[o])                                        where it clips per channel
                 q   = clip(rint(v) + zero_point, qmin, qmax)                      integer output
                 x   = clip(v, low, high)                                          float32 output
                 x   = f16(clip(clip(v, low, high), -65504, 65504))                float16 output
                 q   = e4m3(clip(clip(v, low, high), -448, 448))                   float8 output
    conv, fp32   v   = sum + bias + residual; integer or float8 output: v = f32(v * multiplier); then from the clip
                 per channel on as above. Not bit exact between targets: only integer layers are.
    conv, tf32   as fp32, with w rounded to tf32's 10 bits after the first and a cut off to them where the target multiplies
                 so (GPUs from compute capability 8.0 on); depthwise layers are fp32
    conv, fp16   as fp32, with a and w float16 and the sum of the exact products a * w in float32, in any order; the
                 bias is float32
    conv, fp8    v   = f32(f32(sum * multiplier[o]) + bias[o]), a and w float8, the sum of the exact products in
                 float32, in any order; the bias is float32, in the unit of the output. Then from the residual on as
                 an integer layer; not bit exact between targets.
    add          v = f32(f32(f32(a - a_zp) * a_m) + f32(f32(b - b_zp) * b_m)); then as conv's output
    mul          v = f32(f32((a - a_zp) * (b - b_zp)) * m); then as conv's output
    avg_pool     v = f32(f32(sum(a) - n * a_zp) * m)
    concat       v = f32(f32(a - a_zp) * a_m), per input; the input is copied where scale and zero point agree;
                 of all channels, those the key lists are kept, in its order
    matmul, int8 acc = sum (a - a_zp) * (b - b_zp) over int32, operands and output strided over memory
                 v   = f32(f32(acc) * m); then as conv's output
    matmul, fp32 v   = f32(sum(a * b) * m); then as conv's output; not bit exact between targets
    matmul, fp16 as fp32, with a and b float16 and the sum in float32
    gather       out[i] = a[index[i]] in runs of adjacent elements; index -1 gives zero (integers: the zero point)
    layer_norm, softmax, l2_normalize, scale, shift
                 float32 inside: a uint8 input is dequantized, f32(f32(a - a_zp) * a_m), on the way in; a uint8,
                 float8 or float16 output is rounded on the way out. Scale and shift round twice at most (a short
                 float output once more) and are exact, the others are not bit exact between targets.
                 scale: v = f32(x * c); shift: v = f32(x + c); then f32(v * m) and as conv's output
    lookup       q = table[a]
    pixels       q = table[a, c], a a pixel's uint8 and c its channel; q uint8, int16 or float32
    argmax       i = the first position of the largest x in a row, x float32, i int32
    max_pool     q = max(a)
    activation   v = f32(f(x) * m), x float32 or f32(f32(a) * a_m) with a int16; then as conv's output. Not bit
                 exact between targets, f being transcendental; where f only clips, it is.

float16. An operation converts what it reads in float16 to float32, exactly, before anything else: above, f32(a - a_zp)
is f32(a) then, and where an operation is written for integers and differs for float32 (mul, avg_pool: f32(a * b * m),
f32(mean * m)), float16 takes float32's way. What it writes in float16 comes last and is one rounding, f16(.), to the
nearest, half to even, subnormals kept, of what it would write in float32, held to +-65504 first: no finite v becomes
infinity. A NaN stays NaN. `low` and `high` of an operation with a float16 output lie within +-65504 whether it clips or
not, so that a kernel may clip with them always, and once. Operations that only move values (max_pool, gather, concat,
to_channels_first) move float16 unchanged; to_channels_last rounds what it moves where it writes float16. Conversions:
what reads float32 is a quantize, with `multiplier` 1 for a float16 output; what writes float32 is a dequantize; all
others, float16 to integers and integers to float16 among them, are a requantize:

    x = f32(f32(a - a_zp) * a_m) or f32(f32(a) * a_m); then as conv's output

float8. Real numbers are scale * q, q of type e4m3: 448 at most, no infinity, and the rounding e4m3(.) to the nearest,
half to even, subnormals kept. Everything is as for float16 (q is converted to float32, exactly, on the way in, and one
rounding, held to +-448, ends an operation), but in steps of the scale, as for integers: multipliers, the residual's too,
biases, `low`, `high` and clip_high are those of an output whose unit is its scale, and `low` and `high` lie within +-448
whether the operation clips or not. The scales are

    scale = max(|low|, |high|) / 448 of the value's range;   max |w| / 448 of the weights, per output channel or layer

Only conv reads float8, as its first input or as a residual, besides conversions and what moves values (gather,
to_channels_first); all operations that write any form write it.

No sum leaves int32. For int16 that takes a bound on the bits, shared about equally between activations and
weights. The integers of a value that int16 layers read lie within +-qmax,

    qmax = min over those layers of floor(sqrt(2**31 / r)), at most 32767,
    r    = max over the layer's output channels of sum |w| / max |w|              (float weights)

and each output channel's weight scale is the smallest, max |w| / 32767 or more, with

    qmax * sum |w_q| + max(|bias_q|, 2**28) <= 2**31 - 1                          (checked on the integers)

before granularity and power-of-two rounding may raise it. Thanks to the 2**28 set aside, a new calibration changes
the weights of only those channels whose bias is larger.

A clip per channel has the output's unit. For an integer output it is an integer itself, counted from the zero point,

    clip_high[o] = clip(rint(high[o] / scale) + zero_point, qmin, qmax) - zero_point

so that clipping before rounding gives what clipping after it would.

4-bit weights may be in groups of `weight_group` consecutive input channels i at one kernel position k, the last group
of a position the shorter; they stay integers that one multiplier per output channel serves, within +-127:

    w[o, k, i] = group_scale[o, k, i // weight_group] * q[o, k, i] + group_offset[o, k, i // weight_group]

with q in -8..7 and a scale in 1..15, of which no scales are all one, and no offsets all zero. Offsets without scales
are one for each output channel. Kernels hold q in 4 bits, scales in 4 and offsets in 8, and compute with w.

rint(v) saturates where |v| exceeds int32 only in kernels; lowering bounds multipliers so that |v| < 2**30.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from qsearch.models.graph import Conv, ForeignOp, Matmul, Pool
from qsearch.quantize.affine import Affine

__all__ = ["FLOATS", "INTEGERS", "INTEGER_DTYPES", "Op", "OpKey", "Program", "Value"]

INTEGER_DTYPES = ("uint8", "int16")


@dataclass(frozen=True)
class Value:
    """A tensor of the program.

    Attributes:
        name: Unique within the program.
        shape: Physical shape: (N, H, W, C) for images (the program's input excepted: (N, C, H, W)), else logical.
        dtype: 'uint8', 'int16', 'float8_e4m3fn', 'float16' or 'float32'; 'int32' for a class index.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.size * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class OpKey:
    """What a kernel must know when it is generated; two operations with equal keys share one kernel.

    Attributes:
        kind: 'to_channels_last', 'to_channels_first', 'quantize', 'dequantize', 'requantize', 'conv2d', 'add', 'mul',
            'avg_pool2d', 'max_pool2d', 'concat', 'lookup', 'activation', 'foreign', 'matmul', 'gather', 'layer_norm',
            'softmax', 'l2_normalize', 'scale', 'shift', 'pixels' or 'argmax'.
        shapes: Physical shapes of the inputs, then of the output.
        dtypes: Dtypes of the inputs, then of the output.
        precision: Precision name of a conv2d or matmul, see `qsearch.qtype`.
        conv: Geometry of a conv2d.
        pool: Geometry of a pool.
        residual: conv2d adds its second input.
        clipped: An output that is no integer is clipped to (low, high).
        clips_channels: conv2d clips every output channel at its own high end first.
        weight_group: Input channels of a group of 4-bit weights with a scale of its own; 0 for no such scales.
        weight_offset: 4-bit weights have an offset, in every group or else in every output channel.
        function: Name of an activation that computes in float.
        copies: concat: per input, True if its bytes are copied unchanged.
        channels: concat: which channels of all inputs, one after the other, the output holds; None for all.
        foreign: What a foreign operation calls.
        matmul: Extents and strides of a matmul; its factor is a scalar argument and stays 1 here.
        padded: gather: some places are -1.
        epsilon: Of layer_norm and l2_normalize.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    precision: str | None = None
    conv: Conv = Conv()
    pool: Pool = Pool()
    residual: bool = False
    clipped: bool = False
    function: str | None = None
    copies: tuple[bool, ...] = ()
    channels: tuple[int, ...] | None = None
    foreign: ForeignOp | None = None
    matmul: Matmul = Matmul()
    padded: bool = False
    epsilon: float = 0.0
    clips_channels: bool = False
    weight_group: int = 0
    weight_offset: bool = False


@dataclass(frozen=True)
class Op:
    """One operation of the program.

    Attributes:
        name: Name of the graph node it carries out, with a suffix for conversions.
        key: Its kernel's identity.
        inputs: Names of the values it reads.
        output: The value it writes.
        constants: Arguments that differ between configurations, never part of the key. By kind:
            conv2d: weight int8, int16, float8_e4m3fn, float16 or float32 (O, kh, kw, I/groups), bias int32 or float32 (O,),
            multiplier float32 (O,) (integer and fp8 layers only), weight_scale float32 (O,) (these too; the real step of an
            integer weight, which no kernel reads), clip_high float32 (O,) (where it clips per channel),
            group_scale uint8 and group_offset int8 (O, kh, kw, groups) or (O, 1, 1, 1) (4-bit weights in groups;
            the weight is w, not q);
            and for all kinds, where they apply:
            integers int32 (5,): zero points and clip bounds, see `INTEGERS`;
            floats float32 (5,): scalar multipliers, see `FLOATS`;
            table uint8 (256,) for lookup, of the output's dtype (256, C) for pixels;
            multipliers float32 (n,) and zero_points int32 (n,) for concat;
            foreign: the parameters it names;
            gather: index int32 (runs,); layer_norm: weight and shift float32 (C,); scale and shift: constant float32;
            softmax: constant float32, added first, where it has one.
    """

    name: str
    key: OpKey
    inputs: tuple[str, ...]
    output: Value
    constants: dict[str, np.ndarray] = field(default_factory=dict)


# Positions within the argument vectors `integers` and `floats` that every quantized kernel takes.
INTEGERS = ("a_zero_point", "b_zero_point", "zero_point", "qmin", "qmax")
FLOATS = ("a_multiplier", "b_multiplier", "multiplier", "low", "high")


@dataclass(frozen=True)
class Program:
    """Operations in order.

    Attributes:
        input: The model's input, float32 (N, C, H, W); or pixels, uint8 (N, H, W, C), see `whole_pictures`.
        ops: In execution order.
        output: The model's output, float32; or class indices, int32 (N,).
        affines: Value name -> scale and zero point, of those that are not float32. Kernels know ratios of scales only; formats
            that other programs read hold the scales.
    """

    input: Value
    ops: tuple[Op, ...]
    output: Value
    affines: Mapping[str, Affine] = field(default_factory=dict)
