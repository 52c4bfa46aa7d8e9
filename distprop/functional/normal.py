"""The distribution function of the standard normal, which NumPy lacks and GELU needs.

erfc(z) = t e^(−z² + P(t)) for z ≥ 0, with t = 2/(2 + z), which maps [0, ∞) to (0, 1]; P is a Chebyshev series whose
coefficients were computed with 40 digits; 28 terms give float64's precision. For float32 a polynomial inside a tanh,
which NumPy computes fast, is as good as the usual x (1 + erf)/2. Call it with pieces that fit the cache: `pointwise`.
"""

from __future__ import annotations

import math

import numpy as np

from distprop.tape import Array

_CHEBYSHEV = (
    -1.3026537197817094,
    0.64196979235649026,
    0.019476473204185836,
    -0.0095615147868086316,
    -0.00094659534448203694,
    0.00036683949785276145,
    4.2523324806907772e-05,
    -2.0278578112534243e-05,
    -1.6242900046470255e-06,
    1.3036558355805232e-06,
    1.5626441722066143e-08,
    -8.5238095914926543e-08,
    6.5290544390988515e-09,
    5.0593434955514689e-09,
    -9.9136415649303309e-10,
    -2.2736512229318359e-10,
    9.6467911020155268e-11,
    2.3940380830391147e-12,
    -6.8860275264975534e-12,
    8.9448792730907257e-13,
    3.1309213993429581e-13,
    -1.1270822361367252e-13,
    3.8109052551892321e-16,
    7.1060976136092370e-15,
    -1.5230282014571043e-15,
    -9.4574945712912340e-17,
    1.2102371892242790e-16,
    -2.8166630877471770e-17,
)
# h(x)/x as a polynomial in x², for |x| ≤ 6, where Φ(x) = (1 + tanh h(x))/2: fitted so that the error in x Φ(x) is even.
_TANH = (
    0.7978848814964294,
    0.036333467811346054,
    -3.3204320061486214e-05,
    -5.4917480156291276e-05,
    3.845777882816037e-06,
    -1.1343200867486303e-07,
    1.9777901538731157e-10,
    6.320127060588376e-11,
    -9.801973685844012e-13,
)


def normal_cdf(x: Array) -> Array:
    """Φ(x) = erfc(−x/√2)/2: to float64's precision, and for float32 with an absolute error of 10⁻⁷."""
    return _with_tanh(x) if x.dtype.itemsize <= 4 else _with_erfc(x)


def _with_tanh(x: Array) -> Array:
    squared = np.minimum(x * x, 36)
    h = np.full_like(squared, _TANH[-1])
    for coefficient in _TANH[-2::-1]:
        h *= squared
        h += coefficient
    h *= x
    np.tanh(h, out=h)
    h += 1
    h *= 0.5
    return h


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
