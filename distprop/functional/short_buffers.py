"""A short buffer for NumPy's arithmetic in which one operand is repeated: a number for each row, or a row for all rows.

NumPy walks through such operands in pieces of its buffer's size, 8192 numbers by default. Where several rows fit into
the buffer, it copies the repeated operand there first, as often as it is repeated, which takes longer than the
arithmetic. No row fits into a buffer shorter than it; then a number is multiplied with a row as fast as two rows are.
65,536 float32 times one number for each of 128 rows take 11 µs instead of 22, for each of 512 rows 20 instead of 29.
"""

from __future__ import annotations

import numpy as np

LENGTH = 512  # numbers; casts, which need the buffer, are slower with less


class short_buffers(np.errstate):  # noqa: N801 - a context, named as `errstate` is
    """The context `np.errstate(...)`, and in it a buffer of `LENGTH` numbers.

    It takes 3 µs. What rounding gives is the same: elementwise results do not depend on the buffer.
    """

    def __enter__(self) -> None:
        super().__enter__()
        np.setbufsize(LENGTH)
