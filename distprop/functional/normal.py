"""The distribution function of the standard normal, which NumPy lacks and GELU needs.

erfc(z) = t e^(−z² + P(t)) for z ≥ 0, with t = 2/(2 + z), which maps [0, ∞) to (0, 1]; P is a Chebyshev series whose
coefficients were computed with 40 digits; 28 terms give float64's precision. For float32 a rational function inside a
tanh, which NumPy computes fast, is as good as the usual x (1 + erf)/2. Call it with pieces that fit the cache, as
`pointwise` does.
"""

from __future__ import annotations

import math

import numpy as np

from distprop.allocator import aligned_empty
from distprop.tape import Array

_CHEBYSHEV = (
    -1.3026537197817094, 0.64196979235649026, 0.019476473204185836, -0.0095615147868086316,
    -0.00094659534448203694, 0.00036683949785276145, 4.2523324806907772e-05, -2.0278578112534243e-05,
    -1.6242900046470255e-06, 1.3036558355805232e-06, 1.5626441722066143e-08, -8.5238095914926543e-08,
    6.5290544390988515e-09, 5.0593434955514689e-09, -9.9136415649303309e-10, -2.2736512229318359e-10,
    9.6467911020155268e-11, 2.3940380830391147e-12, -6.8860275264975534e-12, 8.9448792730907257e-13,
    3.1309213993429581e-13, -1.1270822361367252e-13, 3.8109052551892321e-16, 7.1060976136092370e-15,
    -1.5230282014571043e-15, -9.4574945712912340e-17, 1.2102371892242790e-16, -2.8166630877471770e-17,
)  # fmt: skip
# h(x)/x = P(x²)/Q(x²), where Φ(x) = (1 + tanh h(x))/2: fitted for |x| ≤ 6 so that the error in max(1, |x|) Φ(x) is
# even, 5·10⁻⁹; further out the tanh is 1. The rows are P, Q and log φ, beginning with the constant.
_POLYNOMIALS = np.array(
    [
        (20314.8483, 2515.84027, 189.970697, 4.78657116),
        (25460.8847, 1993.66097, 148.469917, 1),
        (-0.5 * math.log(2 * math.pi), -0.5, 0, 0),
    ],
    np.float32,
)
_LARGEST = 1e6  # of x²; no power overflows, and φ is 0


class StandardNormal:
    """Φ(x) = erfc(−x/√2)/2 and φ(x) = e^(−x²/2)/√(2π) of one piece after the other, of up to `size` numbers.

    To float64's precision; for float32 Φ has an absolute error of 10⁻⁷, and φ one of a rounding of x²/2.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._memory: Array | None = None

    def __call__(self, x: Array, cdf: Array, density: Array | None) -> None:
        """Write Φ and, if wanted, φ."""
        if x.dtype == np.float32:
            self._with_tanh(x, cdf, density)
        elif x.dtype.itemsize < 4:
            single = np.empty((2, *x.shape), np.float32)
            self._with_tanh(x.astype(np.float32), single[0, ...], single[1, ...])
            cdf[...] = single[0]
            if density is not None:
                density[...] = single[1]
        else:
            cdf[...] = _with_erfc(x)
            if density is not None:
                density[...] = np.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))

    def _with_tanh(self, x: Array, cdf: Array, density: Array | None) -> None:
        """The polynomials are one product of their coefficients with 1, x², x⁴, x⁶: half the time of Horner's rule.

        tanh and exp write to memory that may not be in the cache: while it comes they have something to compute.
        """
        if self._memory is None:
            self._memory = aligned_empty((7, self._size), x.dtype)
            self._memory[0] = 1
        rows = 2 if density is None else 3
        memory = self._memory[: 4 + rows, : x.size]
        _, squared, fourth, sixth, h, q, *log_density = (row.reshape(x.shape) for row in memory)
        np.multiply(x, x, out=squared)
        if not np.vdot(squared, squared) <= _LARGEST**2:  # rare, and np.minimum takes three passes' time
            np.minimum(squared, _LARGEST, out=squared)
        np.multiply(squared, squared, out=fourth)
        np.multiply(squared, fourth, out=sixth)
        np.matmul(_POLYNOMIALS[:rows], memory[:4], out=memory[4:])
        h /= q
        h *= x
        np.tanh(h, out=cdf)
        cdf *= 0.5
        cdf += 0.5
        if density is not None:
            np.exp(log_density[0], out=density)


def _with_erfc(x: Array) -> Array:
    z = np.abs(x) * math.sqrt(0.5)
    t = 2 / (2 + z)
    tail = 0.5 * t * np.exp(_series(2 * t - 1) - z * z)  # Φ(−|x|)
    return np.where(x < 0, tail, 1 - tail)


def _series(u: Array) -> Array:
    """Σ' c_j T_j(u) by Clenshaw's recurrence, in place; the prime halves c_0."""
    twice, older, newer, spare = 2 * u, np.zeros_like(u), np.zeros_like(u), np.empty_like(u)
    for c in _CHEBYSHEV[:0:-1]:
        np.multiply(twice, newer, out=spare)
        spare -= older
        spare += c
        older, newer, spare = newer, spare, older
    return u * newer - older + 0.5 * _CHEBYSHEV[0]
