"""The distribution function of the standard normal, which NumPy lacks and GELU needs.

erfc(z) = t e^(−z² + P(t)) for z ≥ 0, with t = 2/(2 + z), which maps [0, ∞) to (0, 1]; P is a Chebyshev series whose
coefficients were computed with 40 digits. 28 terms give float64's precision, 12 give float32's.
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
_CHUNK = 16384  # elements: the five arrays of the recurrence stay in the second-level cache


def normal_cdf(x: Array) -> Array:
    """Φ(x) = erfc(−x/√2)/2, with small relative error in the lower tail too."""
    result = np.empty(x.shape, x.dtype)
    flat, values = np.ascontiguousarray(x).reshape(-1), result.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        values[start : start + _CHUNK] = _chunk_cdf(flat[start : start + _CHUNK])
    return result


def _chunk_cdf(x: Array) -> Array:
    z = np.abs(x) * np.asarray(math.sqrt(0.5), x.dtype)
    t = 2 / (2 + z)
    tail = 0.5 * t * np.exp(_series(2 * t - 1, 12 if x.dtype.itemsize <= 4 else 28) - z * z)  # Φ(−|x|)
    return np.where(x < 0, tail, 1 - tail)


def _series(u: Array, terms: int) -> Array:
    """Σ' c_j T_j(u) by Clenshaw's recurrence, in place; the prime halves c_0."""
    twice, older, newer, spare = 2 * u, np.zeros_like(u), np.zeros_like(u), np.empty_like(u)
    for c in _CHEBYSHEV[terms - 1 : 0 : -1]:
        np.multiply(twice, newer, out=spare)
        spare -= older
        spare += u.dtype.type(c)
        older, newer, spare = newer, spare, older
    return u * newer - older + u.dtype.type(0.5 * _CHEBYSHEV[0])
