"""Transcendental functions over float32 vectors, from polynomials: LLVM would call scalar library functions.

Products and sums are written apart; LLVM contracts them into fused operations where the target has them.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.ir import Expr

from qsearch.kernels.cpu.vectors import constant, vector_type

__all__ = ["exp", "normal_cdf", "sigmoid", "tanh"]

# Adding this rounds to an integer and leaves that integer, with the exponent's bias, in the lowest bits.
_ROUNDER = 1.5 * 2.0**23 + 127
# ln 2 in two parts; the first has few bits, so that its products with exponents are exact.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# Keeps results, and what they are then multiplied by, away from subnormal numbers, which cost a hundred cycles each.
_EXP_REACH = 80.0
# exp(r) = 1 + r + r**2 * p(r) for |r| <= ln(2) / 2, fitted to a relative error of 3e-9.
_EXP = (0.49999994, 0.16666521, 0.041668389, 0.0083687166, 0.0013814598)
# 1 - cdf(u) = exp(-u**2 / 2) * t * p(t) with t = 1 / (1 + 0.3 u), u >= 0, fitted to a relative error of 1.5e-7.
_TAIL_RATE = 0.3
_TAIL = (0.1196293, 0.120753944, 0.0999136, 0.12856139, -0.053683665, 0.20635422, -0.15720394, 0.03567509)
# tanh(x) = x + x**3 * p(x**2) for |x| <= 0.625, fitted to a relative error of 3e-9.
_TANH = (-0.3333328, 0.13331442, -0.05373969, 0.020639017, -0.0057049040)
_TANH_SMALL = 0.625


def exp(x: Expr, lanes: int) -> Expr:
    """e**x to 2e-7, relative; arguments beyond +-80 are cut there.

    x = n ln 2 + r with an integer n; e**r comes from a polynomial and 2**n from the exponent's bits.
    """
    x = tirx.min(tirx.max(x, _number(-_EXP_REACH, lanes)), _number(_EXP_REACH, lanes))
    shifted = x * _number(1.4426950408889634, lanes) + _number(_ROUNDER, lanes)
    # Without the fence, adding and subtracting the same number would be simplified away.
    shifted = tirx.call_llvm_pure_intrin(vector_type("float32", lanes), "llvm.arithmetic.fence", shifted)
    n = shifted - _number(_ROUNDER, lanes)
    r = x - n * _number(_LN2_HIGH, lanes) - n * _number(_LN2_LOW, lanes)
    bits = tirx.reinterpret(vector_type("int32", lanes), shifted)
    power = tirx.reinterpret(vector_type("float32", lanes), tirx.shift_left(bits, constant(23, "int32", lanes)))
    return (r * r * _polynomial(r, _EXP, lanes) + r + _number(1.0, lanes)) * power


def sigmoid(x: Expr, lanes: int) -> Expr:
    """1 / (1 + e**-x)."""
    return _number(1.0, lanes) / (_number(1.0, lanes) + exp(_number(0.0, lanes) - x, lanes))


def tanh(x: Expr, lanes: int) -> Expr:
    """The hyperbolic tangent: a polynomial near zero, 1 - 2 / (e**2x + 1) elsewhere."""
    square = x * x
    small = x + x * square * _polynomial(square, _TANH, lanes)
    large = _number(1.0, lanes) - _number(2.0, lanes) / (exp(x + x, lanes) + _number(1.0, lanes))
    return tirx.Select(square < _number(_TANH_SMALL**2, lanes), small, large)


def normal_cdf(x: Expr, lanes: int) -> Expr:
    """The cumulative distribution function of the normal distribution, precise in both tails; gelu(x) = x * cdf(x)."""
    magnitude = tirx.max(x, _number(0.0, lanes) - x)
    t = _number(1.0, lanes) / (_number(1.0, lanes) + _number(_TAIL_RATE, lanes) * magnitude)
    tail = _polynomial(t, _TAIL, lanes) * t * exp(magnitude * magnitude * _number(-0.5, lanes), lanes)
    return tirx.Select(x < _number(0.0, lanes), tail, _number(1.0, lanes) - tail)


def _number(value: float, lanes: int) -> Expr:
    return constant(value, "float32", lanes)


def _polynomial(x: Expr, coefficients: Sequence[float], lanes: int) -> Expr:
    """Horner's rule; coefficients by rising power."""
    value = _number(coefficients[-1], lanes)
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + _number(coefficient, lanes)
    return value
