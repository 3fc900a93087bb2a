"""CPU kernels (numba). Import this only where numba is installed; fused.py decides and prepares the arguments.

Arrays are C-contiguous and float32. A first moment in bfloat16 comes as uint16, its bits, with ``seed`` set. An
argument of None switches a part off: the compiler prunes it, so each combination is a kernel of its own, compiled on
first use and kept on disk. ``threads`` is the number of parts in which the work is done.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import numpy as np
from numba import njit, prange

#: The compiler may reorder sums and contract a·b + c, which vectorises loops; NaN and infinity stay what they are.
MATHS = {"reassoc", "contract", "nsz"}

#: Rows that are summed in float32 before they enter the float64 sum.
BLOCK = 64
#: Rows that are walked forwards, as the memory likes it, in the pass that goes backwards over the matrix.
BACKWARD = 512

ZERO, ONE, HALF_PI = np.float32(0), np.float32(1), np.float32(np.pi / 2)

#: The bits of a float32 that are all set in NaN and infinity alone.
EXPONENT = np.uint32(0x7F800000)

#: atan(z)/z on [0, 1] as a polynomial in z² with the least relative error, 1e-7; from a weighted least-squares fit.
A0, A1, A2, A3 = np.float32(0.99999990), np.float32(-0.33331991), np.float32(0.19969724), np.float32(-0.14019481)
A4, A5, A6, A7 = np.float32(0.09914292), np.float32(-0.05948638), np.float32(0.02425239), np.float32(-0.00469327)


@njit(inline="always")
def _atan2(y, x):
    """atan2(y, x) for x ≥ 0, to 3e-7 relative; atan2(0, 0) = 0."""
    size = abs(y)
    steep = size > x
    numerator = x if steep else size
    denominator = size if steep else x
    z = numerator / (ONE if denominator == ZERO else denominator)  # NaN goes on as NaN
    s = z * z
    angle = z * (A0 + s * (A1 + s * (A2 + s * (A3 + s * (A4 + s * (A5 + s * (A6 + s * A7)))))))
    angle = HALF_PI - angle if steep else angle
    return -angle if y < ZERO else angle


@njit(inline="always")
def _widened(bits):
    """The float32 that a bfloat16 stands for."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@njit(inline="always")
def _rounded(x, index, seed):
    """float32 to bfloat16 as update.stochastically_rounded does it, bit for bit."""
    h = np.uint32(np.uint64(index) * np.uint64(0x9E3779B1) + np.uint64(seed))
    h = np.uint32((h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    h = np.uint32((h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    h = np.uint32(h ^ (h >> np.uint32(16)))
    bits = np.float32(x).view(np.uint32)
    dice = np.uint32(0) if (bits & EXPONENT) == EXPONENT else h & np.uint32(0xFFFF)  # NaN and infinity stay
    return np.uint16((bits + dice) >> np.uint32(16))


@njit(parallel=True, fastmath=MATHS, cache=True)
def sum_squares(grad, total, threads):
    """Rows of ``total`` (threads, H), float64: Σ g² over each thread's rows of ``grad`` (V, H)."""
    rows, columns = grad.shape
    for t in prange(threads):
        part = np.zeros(columns, np.float32)
        total[t] = 0.0
        first, last = rows * t // threads, rows * (t + 1) // threads
        for i in range(first, last):
            g = grad[i]
            for j in range(columns):
                part[j] += g[j] * g[j]
            if (i - first) % BLOCK == BLOCK - 1 or i == last - 1:
                for j in range(columns):
                    total[t, j] += part[j]
                part[:] = ZERO


@njit(parallel=True, fastmath=MATHS, cache=True)
def update_rows(param, exp_avg, grad, root, gain, keep, one_minus_beta1, grad_scale, atan, seed, column, row, threads):
    """Parameter and first moment of a matrix (R, C) whose rows share the second moment.

    θ ← keep·θ − column·row − gain·m·root, or with ``atan`` θ ← keep·θ − column·row − gain·atan2(m, root); ``root`` is
    (C,). m is the first moment before the correction of its bias, which is in ``root`` and ``gain``.
    """
    rows, columns = param.shape
    for t in prange(threads):
        first, last = rows * t // threads, rows * (t + 1) // threads
        # The last blocks first: their gradient was read just now, for the second moment, and may still be in cache.
        for block in range((last - first + BACKWARD - 1) // BACKWARD):
            stop = last - block * BACKWARD
            for i in range(max(stop - BACKWARD, first), stop):
                theta, moment, g = param[i], exp_avg[i], grad[i]
                if column is not None:
                    factor = column[i]
                for j in range(columns):
                    m = moment[j] if seed is None else _widened(moment[j])
                    m += one_minus_beta1 * (g[j] * grad_scale - m)
                    if seed is None:
                        moment[j] = m
                    else:
                        moment[j] = _rounded(m, i * columns + j, seed)
                    new = theta[j] * keep
                    if column is not None:
                        new -= factor * row[j]
                    if atan is None:
                        new -= gain * m * root[j]
                    else:
                        new -= gain * _atan2(m, root[j])
                    theta[j] = new


@njit(parallel=True, fastmath=MATHS, cache=True)
def update_elements(
    param,
    exp_avg,
    exp_avg_sq,
    grad,
    gain,
    keep,
    eps,
    one_minus_beta1,
    one_minus_beta2,
    coupling_factor,
    root_scale,
    m_scale,
    grad_scale,
    atan,
    seed,
    column,
    row,
    period,
    threads,
):
    """Parameter and both moments of flat arrays, taken as rows of the length of ``row`` (B, C); the last may be short.

    θ ← keep·θ − column·row − gain·m/(√v·root_scale + ε), or with ``atan`` … − gain·atan2(m·m_scale, √v·root_scale).
    Row i of the arrays belongs to matrix i // period of the batch.
    """
    size, columns = param.shape[0], row.shape[1]
    rows = (size + columns - 1) // columns
    for t in prange(threads):
        for i in range(rows * t // threads, rows * (t + 1) // threads):
            start, stop = i * columns, min((i + 1) * columns, size)
            theta, moment, second, g = param[start:stop], exp_avg[start:stop], exp_avg_sq[start:stop], grad[start:stop]
            if column is not None:
                factor, direction = column[i], row[i // period]
            for j in range(stop - start):
                x = g[j] * grad_scale
                m = moment[j] if seed is None else _widened(moment[j])
                m += one_minus_beta1 * (x - m)
                if seed is None:
                    moment[j] = m
                else:
                    moment[j] = _rounded(m, start + j, seed)
                v = second[j]
                v += one_minus_beta2 * (x * x + coupling_factor * (m * m) - v)
                second[j] = v
                deviation = np.sqrt(v) * root_scale
                new = theta[j] * keep
                if column is not None:
                    new -= factor * direction[j]
                if atan is None:
                    new -= gain * m / (deviation + eps)
                else:
                    new -= gain * _atan2(m * m_scale, deviation)
                theta[j] = new
