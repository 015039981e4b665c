"""Elementary functions as accurate as torch's, and the gated activations with their derivatives; all in fp32."""

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """e^x for finite x and NaN. tl.exp scales x before the hardware's exp2, an error that grows with |x|; here the
    whole part of the exponent is taken off first. Outside [-150, 150] the result is 0 or infinity anyway."""
    x = tl.where(x > 150.0, 150.0, tl.where(x < -150.0, -150.0, x))  # keeps NaN
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - n * 0.693145751953125) - n * 1.4286068203094172e-06  # ln 2 in two parts, n times the first is exact
    return tl.exp2(rest * 1.4426950408889634) * tl.exp2(n)


@triton.jit
def sigmoid(x, EXACT: tl.constexpr):
    """s = 1 / (1 + e^-x) and 1 - s. EXACT: to the last bits of fp32, the difference too, which cancels for large x.
    Otherwise good for 16 bits, with fewer registers."""
    if EXACT:
        e = exp(-x)
        s = tl.div_rn(1.0, 1.0 + e)
        return s, tl.where(x < 0, 1.0 - s, e * s)
    else:
        s = 1.0 / (1.0 + tl.exp(-x))
        return s, 1.0 - s


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """act(x) and its slope; an unused slope costs nothing. 0 silu, 1 gelu, 2 gelu_tanh, as in sail_ops/moe.py."""
    if ACTIVATION == 0:
        s, rest = sigmoid(x, EXACT)
        return x * s, s * (1.0 + x * rest)
    elif ACTIVATION == 1:
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return x * cdf, cdf + x * 0.3989422804014327 * exp(-0.5 * x * x)
    else:
        # 0.5 (1 + tanh(u)) = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        s, rest = sigmoid(x * (1.5957691216057308 + 0.07135481282712 * x * x), EXACT)
        return x * s, s + x * s * rest * (1.5957691216057308 + 0.21406443848136 * x * x)


@triton.jit
def clamp_gate(gate, clamp):
    return tl.where(gate > clamp, clamp, gate)  # keeps NaN


@triton.jit
def clamp_up(up, clamp):
    return tl.where(up > clamp, clamp, tl.where(up < -clamp, -clamp, up))
