"""GPU kernels: the equations compiled by Triton. Import this only where triton is installed; gpu.py launches them.

Tensors are contiguous; parameters and gradients are float32, bfloat16 or float16, first moments float32, bfloat16 (then
with a ``seed``) or int8 (then with ``scales`` too), the rest float32, and so is all arithmetic. An argument of None
switches a part off: each combination is a kernel of its own. The numbers of a step are floats, or lie on the device as
tensors of one element: the host never waits for them. Where ``halt`` points to a number that is not 0, nothing changes.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,name-defined"
# mypy: disable-error-code="attr-defined,has-type,index,operator,misc"

import triton
import triton.language as tl

from coupled_adam.optim import eight_bit, equations, rounding
from coupled_adam.optim.backends.gpu_forms import triton_form

first_moment, second_moment = triton_form(equations.first_moment), triton_form(equations.second_moment)
squared, moved, centered = map(triton_form, (equations.squared, equations.moved, equations.centered))
key_of, dice_of = triton_form(rounding.key_of), triton_form(rounding.dice_of)

number_of, magnitude_of = triton_form(eight_bit.number_of), triton_form(eight_bit.magnitude_of)

#: Tensors that one launch of ``move_many`` takes.
MANY = 32

#: The bits of a float32 that are all set in NaN and infinity alone.
EXPONENT = tl.constexpr(0x7F800000)
SMALLEST, PER_FACE = tl.constexpr(float(eight_bit.SMALLEST)), tl.constexpr(float(eight_bit.PER_FACE))


@triton.jit
def _value(x):
    """Return a number, whether it was given or lies in memory."""
    if getattr(x, "dtype", tl.float32).is_ptr():  # the interpreter gives numbers as Python has them
        return tl.load(x)
    else:  # what follows a return is compiled too
        return x


@triton.jit
def _number(x):
    return tl.cast(_value(x), tl.float32)


@triton.jit
def _read(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _dice(index, seed):
    """Throw the dice of rounding.py for elements of these indices, int64."""
    key = key_of((index >> 32).to(tl.uint32), tl.cast(_value(seed), tl.uint32))
    return dice_of(index.to(tl.uint32), key)


@triton.jit
def _write_moment(pointer, at, mask, m, index, seed):
    """Store a first moment; to bfloat16 as rounding.stochastically_rounded does it, bit for bit."""
    if seed is None:
        tl.store(pointer + at, m, mask=mask)
    else:
        bits = m.to(tl.uint32, bitcast=True)
        dice = tl.where((bits & EXPONENT) == EXPONENT, 0, _dice(index, seed))  # NaN and infinity stay
        tl.store(pointer + at, ((bits + dice) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)


@triton.jit
def _unpacked(pointer, at, mask, scale):
    """Read numbers in eight bits, as eight_bit.widened does."""
    code = tl.load(pointer + at, mask=mask, other=0).to(tl.float32)
    size = magnitude_of(tl.abs(code))
    return tl.where(code < 0, -size, size) * scale


@triton.jit
def _pack(pointer, at, mask, m, index, seed):
    """Store rows of a tile, a block each, as eight_bit.quantized does, bit for bit, and return their scales."""
    size = tl.abs(m)
    # Sizes are ordered as their bits are, infinity and NaN last.
    largest = tl.max(tl.where(mask, size.to(tl.int32, bitcast=True), 0), 1)
    scale = largest.to(tl.float32, bitcast=True)
    scale = tl.where(largest >= EXPONENT, float("nan"), tl.where(scale < SMALLEST, 0.0, scale))
    live = (scale > 0)[:, None]
    dice = _dice(index, seed).to(tl.float32)
    n = number_of(tl.div_rn(tl.where(live, size, 0.0), tl.where(scale > 0, scale, 1.0)[:, None])) + dice * PER_FACE
    code = n.to(tl.int32)
    code = tl.where(live, tl.where(m < 0, -code, code), 0)
    tl.store(pointer + at, code.to(tl.int8), mask=mask)
    return scale


@triton.jit(do_not_specialize=["rows"])
def sum_rows(
    grad,
    exp_avg,
    total,
    rows,
    columns,
    grad_factor,
    first_rate,
    coupling_factor,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Fill ``total`` (blocks, H), float32, with Σ g² over ROWS rows each, or with Σ (f·g)² + κ·m² given ``exp_avg``.

    Every element of a tile has a sum of its own, of ROWS / TILE terms; these are added in pairs.
    """
    j = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    at = tl.arange(0, TILE)[:, None] * columns + j[None, :]
    part = tl.zeros((TILE, WIDTH), tl.float32)
    for step in range(ROWS // TILE):
        first = tl.program_id(0).to(tl.int64) * ROWS + step * TILE
        here = (first + tl.arange(0, TILE) < rows)[:, None] & (j < columns)[None, :]
        g = _read(grad + first * columns, at, here)
        if exp_avg is None:
            part += g * g
        else:
            factor = _number(grad_factor)
            m = first_moment(_read(exp_avg + first * columns, at, here), g, factor, first_rate)
            part += squared(g, m, factor, _number(coupling_factor))
    tl.store(total + tl.program_id(0).to(tl.int64) * columns + j, tl.sum(part, 0), mask=j < columns)


@triton.jit
def root_of_rows(exp_avg_sq, square, root, halt, columns, second_rate, root_scale, WIDTH: tl.constexpr):
    """Do what plain.root_of_rows_ does; all but the numbers are (H,)."""
    if halt is not None:
        if tl.load(halt) != 0:
            return
    j = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    here = j < columns
    v = second_moment(_read(exp_avg_sq, j, here), _read(square, j, here), second_rate)
    tl.store(exp_avg_sq + j, v, mask=here)
    tl.store(root + j, _number(root_scale) * tl.sqrt_rn(v), mask=here)


@triton.jit(do_not_specialize=["rows", "period", "seed"])
def move_matrix(
    param,
    grad,
    exp_avg,
    scales,
    exp_avg_sq,
    root,
    factors,
    column,
    row,
    mean,
    halt,
    rows,
    columns,
    period,
    grad_factor,
    first_rate,
    second_rate,
    coupling_factor,
    first_scale,
    root_scale,
    eps,
    lr,
    decay,
    seed,
    toward: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Do what plain.move does: to rows if ``root`` (H,) is given, to elements if ``exp_avg_sq`` is. ``factors`` (R,)
    multiply the root of each row.

    With ``column`` (R,) and ``row`` (R / period, H) the decay is spectral. With ``scales`` (R, ⌈H / WIDTH⌉) a row of a
    tile is a block of numbers in eight bits. ``mean`` (H,) is subtracted in the end.
    """
    if halt is not None:
        if tl.load(halt) != 0:
            return
    # The last rows first: their gradient was read just now, for the second moment, and may still be in cache.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * TILE
    i, j = first + tl.arange(0, TILE), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    here = (i < rows)[:, None] & (j < columns)[None, :]
    start = first * columns
    at = tl.arange(0, TILE)[:, None] * columns + j[None, :]
    g, theta = _read(grad + start, at, here), _read(param + start, at, here)
    if scales is None:
        m = first_moment(_read(exp_avg + start, at, here), g, _number(grad_factor), first_rate)
        _write_moment(exp_avg + start, at, here, m, start + at, seed)
    else:
        block = i * tl.num_programs(1) + tl.program_id(1)
        m = _unpacked(exp_avg + start, at, here, _read(scales, block, i < rows)[:, None])
        m = first_moment(m, g, _number(grad_factor), first_rate)
        tl.store(scales + block, _pack(exp_avg + start, at, here, m, start + at, seed), mask=i < rows)
    if root is None:
        v = _read(exp_avg_sq + start, at, here)
        v = second_moment(v, squared(g, m, _number(grad_factor), _number(coupling_factor)), second_rate)
        tl.store(exp_avg_sq + start + at, v, mask=here)
        way = toward(_number(first_scale) * m, _number(root_scale) * tl.sqrt_rn(v), _number(eps))
    else:
        own = _read(root, j, j < columns)[None, :]
        if factors is not None:
            own = own * _read(factors, i, i < rows)[:, None]
        way = toward(_number(first_scale) * m, own, _number(eps))
    if column is None:
        theta = moved(theta, theta, _number(decay), _number(lr), way)
    else:
        right = _read(row, (i // period)[:, None] * columns + j[None, :], here)
        theta = moved(theta, _read(column, i, i < rows)[:, None] * right, _number(decay), _number(lr), way)
    if mean is not None:
        theta = centered(theta, _read(mean, j, j < columns)[None, :])
    tl.store(param + start + at, theta, mask=here)


@triton.jit(do_not_specialize=["seed"])
def move_many(
    parameters,
    grads,
    exp_avgs,
    exp_avg_sqs,
    sizes,
    halt,
    grad_factor,
    first_rate,
    second_rate,
    coupling_factor,
    first_scale,
    root_scale,
    eps,
    lr,
    decay,
    seed,
    toward: tl.constexpr,
    MANY: tl.constexpr,
    SCALES: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Do what plain.move does to elements, for MANY tensors at once, of which a program takes BLOCK elements of one.

    Args:
        parameters, grads, exp_avgs, exp_avg_sqs: tuples of tensors, alike in dtype, at multiples of 16 bytes. (An
            argument that is called ``params`` breaks Triton's launcher.)
        sizes: of size + 1 the upper half of 64 bits, the lower 0: a kernel is compiled anew for other types, and for
            numbers that 16 divides or not, and these are all alike.
        seed: an array of seeds if SCALES is set.
        SCALES: whether first_scale, root_scale and seed are arrays, with one entry a tensor.
        EVEN: whether 8 divides all sizes, so that no access of several elements reaches beyond the end.
    """
    if halt is not None:
        if tl.load(halt) != 0:
            return
    block, size, which = tl.program_id(0), tl.cast(0, tl.int64), 0
    param, exp_avg, exp_avg_sq, grad = parameters[0], exp_avgs[0], exp_avg_sqs[0], grads[0]
    begin = 0
    first = tl.cast(0, tl.int64)
    for k in tl.static_range(MANY):
        n = (sizes[k] >> 32) - 1
        end = begin + ((n + BLOCK - 1) // BLOCK).to(tl.int32)
        if (block >= begin) & (block < end):
            param, exp_avg, exp_avg_sq, grad = parameters[k], exp_avgs[k], exp_avg_sqs[k], grads[k]
            size, which, first = n, k, (block - begin).to(tl.int64) * BLOCK
        begin = end
    at = first + tl.arange(0, BLOCK)
    here = at < size
    if EVEN:
        here = tl.max_constancy(here, 8)
    # Whichever tensor it is, it begins at a multiple of 16 bytes, and so do blocks of it.
    param, exp_avg = tl.multiple_of(param + at, 16), tl.multiple_of(exp_avg + at, 16)
    exp_avg_sq, grad = tl.multiple_of(exp_avg_sq + at, 16), tl.multiple_of(grad + at, 16)
    g, theta = _read(grad, 0, here), _read(param, 0, here)
    m = first_moment(_read(exp_avg, 0, here), g, _number(grad_factor), first_rate)
    if SCALES:
        first_scale += which
        root_scale += which
        if seed is not None:
            seed += which
    _write_moment(exp_avg, 0, here, m, at, seed)
    v = second_moment(
        _read(exp_avg_sq, 0, here), squared(g, m, _number(grad_factor), _number(coupling_factor)), second_rate
    )
    tl.store(exp_avg_sq, v, mask=here)
    way = toward(_number(first_scale) * m, _number(root_scale) * tl.sqrt_rn(v), _number(eps))
    tl.store(param, moved(theta, theta, _number(decay), _number(lr), way), mask=here)
