"""CPU kernels: the equations compiled by numba. Import this only where numba is installed; cpu.py prepares arguments.

Arrays are C-contiguous and float32. A first moment in bfloat16 comes as uint16, its bits, with ``seed`` set; one in
eight bits as int8, with ``seed`` and ``scales`` set. An argument of None switches a part off: the compiler prunes it,
so each combination is a kernel of its own, compiled on first use and kept on disk. ``threads`` is the number of parts
in which the work is done.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import functools
import hashlib
import operator
from pathlib import Path

import numpy as np
from numba import njit, prange, types
from numba.extending import intrinsic, register_jitable

from coupled_adam.optim import directions, eight_bit, equations, rounding

inlined = register_jitable(inline="always")
first_moment, second_moment = inlined(equations.first_moment), inlined(equations.second_moment)
squared, moved, centered = inlined(equations.squared), inlined(equations.moved), inlined(equations.centered)
number_of, magnitude_of = inlined(eight_bit.number_of), inlined(eight_bit.magnitude_of)

#: What is compiled into the kernels from other files.
SOURCES = b"".join(Path(str(module.__file__)).read_bytes() for module in (equations, directions, rounding, eight_bit))

#: Rows that are summed in float32 before they enter the float64 sum.
BLOCK = 64
#: Rows that are walked forwards, as the memory likes it, in the pass that goes backwards over the matrix.
BACKWARD = 512
#: Columns that are taken at once where column sums are kept beside them; and what keeps the rows of an array that holds
#: so many columns from lying at multiples of 4,096 bytes, where processors mix them up.
TILE, PAD = 1024, 48
#: Bytes of a line of the cache.
LINE = 64

#: Rows of the array in which a tile of a moment in eight bits is worked on: √ν̂, the vector of spectral decay, a row's
#: numbers, and the scale of each.
ROOT, DECAY, NUMBER, SCALE = range(4)

ZERO, ONE = np.float32(0), np.float32(1)
WIDTH, SMALLEST, PER_FACE = eight_bit.BLOCK, eight_bit.SMALLEST, eight_bit.PER_FACE

#: The bits of a float32 that are all set in NaN and infinity alone.
EXPONENT = np.uint32(0x7F800000)
#: All of its bits but the sign.
SIZE = np.uint32(0x7FFFFFFF)


class Word:
    """An integer of 32 bits in a function that LLVM compiles.

    numba makes all integers 64 bits wide, and so the vectors half as long; for products of such there is no instruction
    in AVX2.
    """

    def __init__(self, builder, value):
        self.builder, self.value = builder, value

    def _apply(self, name, other):
        other = other.value if isinstance(other, Word) else self.value.type(other)
        return Word(self.builder, getattr(self.builder, name)(self.value, other))

    def __add__(self, other):
        return self._apply("add", other)

    def __mul__(self, other):
        return self._apply("mul", other)

    def __xor__(self, other):
        return self._apply("xor", other)

    def __and__(self, other):
        return self._apply("and_", other)

    def __rshift__(self, other):
        return self._apply("lshr", other)


def in_words(function):
    """Have numba compile a function of two integers, made of operators alone, in 32 bits."""

    def codegen(context, builder, signature, given):
        return function(*(Word(builder, x) for x in given)).value

    return intrinsic(lambda context, x, y: (types.uint32(types.uint32, types.uint32), codegen))


key_of, dice_of, sum_of = in_words(rounding.key_of), in_words(rounding.dice_of), in_words(operator.add)


def _version(direction):
    """Make a part of the key of numba's cache, which would not see that a file beside this one has changed."""
    code = direction.__code__
    return hashlib.sha256(SOURCES + code.co_code + repr((code.co_consts, code.co_names)).encode()).hexdigest()


@njit(inline="always")
def _widened(bits):
    """Return the float32 that a bfloat16 stands for."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@njit(inline="always")
def _keys(start, seed):
    """Return the keys of the dice for an index and for those whose upper half is greater by one."""
    return key_of(start >> 32, seed), key_of((start >> 32) + 1, seed)


@njit(inline="always")
def _dice(start, j, keys):
    """Throw the dice of rounding.py for the index ``start`` + j, j below 2^32, with the keys of ``start``."""
    low = sum_of(start, j)
    return dice_of(low, keys[0] if low >= np.uint32(start) else keys[1])


@njit(inline="always")
def _rounded(x, dice):
    """Round float32 to bfloat16 as rounding.stochastically_rounded does, bit for bit."""
    bits = np.float32(x).view(np.uint32)
    if (bits & EXPONENT) == EXPONENT:  # NaN and infinity stay
        dice = np.uint32(0)
    return np.uint16((bits + dice) >> np.uint32(16))


@njit
def _float32_of(bits):
    return np.uint32(bits).view(np.float32)


@njit(inline="always")
def _unpacked(code, scale):
    """Return the number of a code, as eight_bit.widened does."""
    size = magnitude_of(np.float32(abs(np.int32(code))))
    return (-size if code < 0 else size) * scale


@njit
def _scale_of(numbers):
    """Return the scale of a block of numbers, as eight_bit.quantized does."""
    bits = numbers.view(np.uint32)
    largest = np.uint32(0)
    for j in range(len(bits)):  # sizes are ordered as their bits are, infinity and NaN last
        size = np.uint32(bits[j] & SIZE)
        largest = size if size > largest else largest
    scale = _float32_of(largest)
    if largest >= EXPONENT:
        return np.float32(np.nan)
    return scale if scale >= SMALLEST else ZERO


@njit(error_model="numpy")  # else a division by 0 raises, and loops stay scalar
def _pack(tile, codes, scales, start, seed):
    """Fill ``codes`` (n,) and ``scales`` (⌈n / 256⌉,) as eight_bit.quantized does, bit for bit, from numbers in a row.

    ``start`` is the index of the first number; ``tile`` is as in ``eight_bit_rows_kernel``.
    """
    size, keys = len(codes), _keys(start, seed)
    for k in range(len(scales)):
        scales[k] = scale = _scale_of(tile[NUMBER, k * WIDTH : min((k + 1) * WIDTH, size)])
        if not scale > ZERO:
            tile[NUMBER, k * WIDTH : (k + 1) * WIDTH], scale = ZERO, ONE  # whose codes are 0
        tile[SCALE, k * WIDTH : (k + 1) * WIDTH] = scale
    for j in range(size):
        m = tile[NUMBER, j]
        dice = np.float32(np.int32(_dice(start, j, keys)))
        code = np.int32(number_of(abs(m) / tile[SCALE, j]) + dice * PER_FACE)
        codes[j] = np.int8(-code if m < ZERO else code)


@njit(inline="always")
def _lines(rows):
    """Make an array of zeros, (rows, TILE + PAD), whose rows begin where lines of the cache do.

    A vector that lies across two of them is read and written in two accesses.
    """
    raw = np.zeros(rows * (TILE + PAD) + LINE // 4, np.float32)
    skip = -(raw.ctypes.data // 4) % (LINE // 4)
    return raw[skip : skip + rows * (TILE + PAD)].reshape(rows, TILE + PAD)


@njit(fastmath={"reassoc", "contract", "nsz"})  # sums in any order, or loops stay scalar
def _add_rows(grad, total, plain):
    """Add Σ g² over a few rows of ``grad`` (R, H) to ``total`` (H,), and Σ g to ``plain`` (H,); None for nothing."""
    rows, columns = grad.shape
    fours = rows // 4 * 4
    for left in range(0, columns, TILE):
        right = min(left + TILE, columns)
        width = right - left
        part = _lines(2)
        for i in range(0, fours, 4):  # together, since sums are read and written with all that is added
            p, q, r, s = (
                grad[i, left:right],
                grad[i + 1, left:right],
                grad[i + 2, left:right],
                grad[i + 3, left:right],
            )
            for j in range(width):
                part[0, j] += (p[j] * p[j] + q[j] * q[j]) + (r[j] * r[j] + s[j] * s[j])
                if plain is not None:
                    part[1, j] += (p[j] + q[j]) + (r[j] + s[j])
        for i in range(fours, rows):
            g = grad[i, left:right]
            for j in range(width):
                part[0, j] += g[j] * g[j]
                if plain is not None:
                    part[1, j] += g[j]
        total[left:right] += part[0, :width]
        if plain is not None:
            plain[left:right] += part[1, :width]


@njit(parallel=True, cache=True)
def sum_of_squares_kernel(grad, total, plain, threads):
    """Fill ``total`` (threads, H), float64, with Σ g² over each thread's rows of ``grad`` (V, H).

    ``plain``, of the same shape, with Σ g; None for nothing.
    """
    rows = grad.shape[0]
    for t in prange(threads):
        first, last = rows * t // threads, rows * (t + 1) // threads
        total[t] = 0.0
        if plain is not None:
            plain[t] = 0.0
        for start in range(first, last, BLOCK):
            block = grad[start : min(start + BLOCK, last)]
            _add_rows(block, total[t], None if plain is None else plain[t])


@njit(parallel=True, cache=True)
def column_sums_kernel(param, exp_avg, seed, sums, threads):
    """Fill ``sums`` (threads, 2, H), float64, as ``move_centered`` does while it writes these tensors, to the bit."""
    rows, columns = param.shape
    for t in prange(threads):
        first, last = rows * t // threads, rows * (t + 1) // threads
        part = np.zeros((2, columns), np.float32)
        sums[t] = 0.0
        for block in range((last - first + BACKWARD - 1) // BACKWARD):
            stop = last - block * BACKWARD
            start = max(stop - BACKWARD, first)
            for i in range(start, stop):
                for j in range(columns):
                    part[0, j] += param[i, j]
                for j in range(columns):
                    part[1, j] += exp_avg[i, j] if seed is None else _widened(exp_avg[i, j])
                if (i - start) % BLOCK == BLOCK - 1 or i == stop - 1:
                    sums[t] += part
                    part[:] = ZERO


@functools.cache
def rows_kernel(direction):
    """Make the kernel that does what plain.move does to rows, for the ``numbers`` of a Direction.

    param, grad, exp_avg: (R, C); root: (C,); c: Coefficients of float32; column: (R,) and row: (C,) of spectral
    decay, or None; seed: int64, or None where the first moment is float32; factors: (R,), what the root of each row is
    multiplied by, or None.
    """
    toward, version = inlined(direction), _version(direction)

    @njit(parallel=True, cache=True)
    def move_rows(param, grad, exp_avg, root, c, seed, column, row, factors, threads):
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
                    if factors is not None:
                        of_row = factors[i]
                    if seed is not None:
                        start = i * columns
                        keys = _keys(start, seed)
                    for j in range(columns):
                        m = moment[j] if seed is None else _widened(moment[j])
                        m = first_moment(m, g[j], c.grad_factor, c.first_rate)
                        moment[j] = m if seed is None else _rounded(m, _dice(start, j, keys))
                        shrink = theta[j] if column is None else factor * row[j]
                        own = root[j] if factors is None else root[j] * of_row
                        theta[j] = moved(theta[j], shrink, c.decay, c.lr, toward(c.first_scale * m, own, c.eps))
        return version

    return move_rows


@functools.cache
def eight_bit_rows_kernel(direction):
    """Make the kernel that does what plain.move does to rows to a moment in eight bits.

    exp_avg: (R, C), int8; scales: (R, ⌈C / 256⌉); seed: int64. Other arguments as of ``rows_kernel``, which is a kernel
    of its own since the compiler vectorizes its innermost loop only where that runs over whole rows.
    """
    toward, version = inlined(direction), _version(direction)

    @njit(parallel=True, cache=True)
    def move_rows(param, grad, exp_avg, scales, root, c, seed, column, row, factors, threads):
        rows, columns = param.shape
        for t in prange(threads):
            first, last = rows * t // threads, rows * (t + 1) // threads
            # In one array whose layout the compiler knows: it vectorizes loops only if it can tell cheaply that what is
            # written does not overlap with what is read.
            tile = _lines(4)
            for block in range((last - first + BACKWARD - 1) // BACKWARD):
                stop = last - block * BACKWARD
                for left in range(0, columns, TILE):
                    right = min(left + TILE, columns)
                    tile[ROOT, : right - left] = root[left:right]
                    if column is not None:
                        tile[DECAY, : right - left] = row[left:right]
                    for i in range(max(stop - BACKWARD, first), stop):
                        codes, part = exp_avg[i, left:right], scales[i, left // WIDTH : (right + WIDTH - 1) // WIDTH]
                        for k in range(len(part)):
                            tile[SCALE, k * WIDTH : (k + 1) * WIDTH] = part[k]
                        theta, g = param[i, left:right], grad[i, left:right]
                        if column is not None:
                            factor = column[i]
                        if factors is not None:
                            of_row = factors[i]
                        for j in range(right - left):
                            m = first_moment(_unpacked(codes[j], tile[SCALE, j]), g[j], c.grad_factor, c.first_rate)
                            tile[NUMBER, j] = m
                            shrink = theta[j] if column is None else factor * tile[DECAY, j]
                            own = tile[ROOT, j] if factors is None else tile[ROOT, j] * of_row
                            way = toward(c.first_scale * m, own, c.eps)
                            theta[j] = moved(theta[j], shrink, c.decay, c.lr, way)
                        _pack(tile, codes, part, i * columns + left, seed)
        return version

    return move_rows


@functools.cache
def centered_rows_kernel(direction):
    """Make the kernel that does what plain.move does to rows given ``mean`` (C,), and sums what it writes.

    sums: (threads, 2, C), float64, to fill with the column sums of what is in param and exp_avg afterwards. Other
    arguments as of ``rows_kernel``.
    """
    toward, version = inlined(direction), _version(direction)

    @njit(parallel=True, cache=True)
    def move_centered(param, grad, exp_avg, root, c, seed, mean, sums, threads):
        rows, columns = param.shape
        for t in prange(threads):
            first, last = rows * t // threads, rows * (t + 1) // threads
            sums[t] = 0.0
            # √ν̂, the mean and both sums in one array whose layout the compiler knows: it vectorizes the innermost loop
            # only if it can tell cheaply that what is written there does not overlap with what is read.
            rest = _lines(4)
            for block in range((last - first + BACKWARD - 1) // BACKWARD):
                stop = last - block * BACKWARD
                start = max(stop - BACKWARD, first)
                for left in range(0, columns, TILE):
                    width = min(TILE, columns - left)
                    rest[0, :width], rest[1, :width] = root[left : left + width], mean[left : left + width]
                    for i in range(start, stop):
                        theta, moment = param[i, left : left + width], exp_avg[i, left : left + width]
                        g = grad[i, left : left + width]
                        if seed is not None:
                            at = i * columns + left
                            keys = _keys(at, seed)
                        for j in range(width):
                            m = moment[j] if seed is None else _widened(moment[j])
                            m = first_moment(m, g[j], c.grad_factor, c.first_rate)
                            bits = m if seed is None else _rounded(m, _dice(at, j, keys))
                            moment[j] = bits
                            way = toward(c.first_scale * m, rest[0, j], c.eps)
                            new = centered(moved(theta[j], theta[j], c.decay, c.lr, way), rest[1, j])
                            theta[j] = new
                            rest[2, j] += new
                            rest[3, j] += m if seed is None else _widened(bits)
                        if (i - start) % BLOCK == BLOCK - 1 or i == stop - 1:
                            sums[t, :, left : left + width] += rest[2:, :width]
                            rest[2:, :width] = ZERO
        return version

    return move_centered


@functools.cache
def elements_kernel(direction):
    """Make the kernel that does what plain.move does to elements, for the ``numbers`` of a Direction.

    All arrays are flat, taken as rows of the length of ``row`` (B, C); the last may be short. Row i belongs to matrix
    i // period of the batch. ``column`` (R,) is None without spectral decay; ``row`` is then only for its length.
    """
    toward, version = inlined(direction), _version(direction)

    @njit(parallel=True, cache=True)
    def move_elements(param, grad, exp_avg, exp_avg_sq, c, seed, column, row, period, threads):
        size, columns = param.shape[0], row.shape[1]
        rows = (size + columns - 1) // columns
        for t in prange(threads):
            for i in range(rows * t // threads, rows * (t + 1) // threads):
                start, stop = i * columns, min((i + 1) * columns, size)
                theta, moment = param[start:stop], exp_avg[start:stop]
                second, g = exp_avg_sq[start:stop], grad[start:stop]
                if column is not None:
                    factor, right = column[i], row[i // period]
                if seed is not None:
                    keys = _keys(start, seed)
                for j in range(stop - start):
                    m = moment[j] if seed is None else _widened(moment[j])
                    m = first_moment(m, g[j], c.grad_factor, c.first_rate)
                    moment[j] = m if seed is None else _rounded(m, _dice(start, j, keys))
                    square = squared(g[j], m, c.grad_factor, c.coupling_factor)
                    v = second_moment(second[j], square, c.second_rate)
                    second[j] = v
                    shrink = theta[j] if column is None else factor * right[j]
                    way = toward(c.first_scale * m, c.root_scale * np.sqrt(v), c.eps)
                    theta[j] = moved(theta[j], shrink, c.decay, c.lr, way)
        return version

    return move_elements
