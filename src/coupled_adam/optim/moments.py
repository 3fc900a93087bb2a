"""What a first moment is kept in, by the ``exp_avg_dtype`` of a param group; and second moments of rows.

A form is chosen, made, read and written here; rounding.py and eight_bit.py have the codes. Backends with
kernels refuse a form that they have none for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from coupled_adam.optim.eight_bit import EightBit, Moment, blocks_of, quantized, widened
from coupled_adam.optim.equations import Number, working_dtype
from coupled_adam.optim.reductions import holders, local, placed_like, rows_like
from coupled_adam.optim.rounding import stochastically_rounded
from coupled_adam.optim.typed import MomentDtype

#: What a group may ask for. Moments of parameters that are not coupled are float32 with "8bit" too.
MOMENT_DTYPES: tuple[MomentDtype, ...] = (None, torch.bfloat16, "8bit")

#: The keys of a state whose first moment is in 8 bits: codes and scales.
EIGHT_BIT = ("exp_avg_codes", "exp_avg_scales")


#: The key of the second moments of the rows, which a ``row_exponent`` needs.
ROWS = "exp_avg_sq_rows"


def has_rows(group: Mapping[str, Any]) -> bool:
    """Return whether the rows of a group's matrices have second moments of their own beside the one that they share."""
    return bool(group["second_moment"] == "vocabulary" and group["row_exponent"])


def new_rows(param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """Make the second moments of the rows, 0; empty where the group needs none."""
    if not has_rows(group):
        return {}
    if holders(param, 1):
        raise ValueError(
            f"a coupled parameter of shape {tuple(param.shape)} is sharded over its columns, and row_exponent needs "
            "whole rows: shard it over the vocabulary, or set row_exponent=0"
        )
    part = local(param)
    return {ROWS: rows_like(param, part.new_zeros((len(part), 1), dtype=working_dtype(param)))}


def keys_of(state: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of the first moment in a state; the first has the parameter's shape."""
    return EIGHT_BIT if EIGHT_BIT[0] in state else ("exp_avg",)


def shapes_of(state: Mapping[str, Any], shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the shapes under these keys for a parameter of this shape."""
    whole = tuple(shape)
    return [whole, (*whole[:-1], blocks_of(whole[-1]))] if EIGHT_BIT[0] in state else [whole]


def dtypes_of(state: Mapping[str, Any], param: Tensor, group: Mapping[str, Any]) -> list[torch.dtype]:
    """Return the dtypes under these keys."""
    return [torch.int8, torch.float32] if EIGHT_BIT[0] in state else [_plain_dtype(param, group)]


def new_moment(param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """Make a first moment of 0, in the form that the group keeps it in."""
    if group["exp_avg_dtype"] != "8bit" or group["second_moment"] != "vocabulary":
        return {"exp_avg": torch.zeros_like(param, dtype=_plain_dtype(param, group))}
    if holders(param, 1):
        raise ValueError(
            f"a coupled parameter of shape {tuple(param.shape)} is sharded over its columns, and exp_avg_dtype='8bit' "
            "needs whole rows: shard it over the vocabulary, or choose exp_avg_dtype=torch.bfloat16"
        )
    part = local(param)
    scales = part.new_zeros((len(part), blocks_of(part.shape[1])), dtype=torch.float32)
    return dict(zip(EIGHT_BIT, (torch.zeros_like(param, dtype=torch.int8), rows_like(param, scales)), strict=True))


def _plain_dtype(param: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    chosen = group["exp_avg_dtype"]
    return chosen if isinstance(chosen, torch.dtype) else working_dtype(param)


def local_moment(state: Mapping[str, Any]) -> Moment:
    """Return this process's part of the first moment of a state."""
    if EIGHT_BIT[0] in state:
        return EightBit(*(local(state[key]) for key in EIGHT_BIT))
    return local(state["exp_avg"])


def numbers_of(exp_avg: Moment) -> Tensor:
    """Return a first moment as a floating-point tensor."""
    return widened(exp_avg) if isinstance(exp_avg, EightBit) else exp_avg


def numbers_of_moment(state: Mapping[str, Any]) -> Tensor:
    """Return the first moment of a state as floating-point numbers, a DTensor if it is one."""
    if EIGHT_BIT[0] in state:
        return rows_like(state[EIGHT_BIT[0]], numbers_of(local_moment(state)))
    moment: Tensor = state["exp_avg"]
    return moment


def keep_(kept: Moment, m: Tensor, step: Number, first: int = 0) -> None:
    """Write the numbers ``m`` into a first moment; ``first`` is the index of the first of them in the whole tensor."""
    if isinstance(kept, EightBit):
        for now, new in zip(kept, quantized(m, step, first), strict=True):
            now.copy_(new)
    elif kept.dtype == torch.bfloat16:
        kept.copy_(stochastically_rounded(m, step, first))
    elif m is not kept:  # updated in place
        kept.copy_(m)


def split_rows(moment: Moment, rows: int) -> Sequence[Moment]:
    """Split a first moment as ``torch.split`` does."""
    if isinstance(moment, EightBit):
        return list(map(EightBit, torch.split(moment.codes, rows), torch.split(moment.scales, rows)))
    return torch.split(moment, rows)


def in_form_of(fresh: Mapping[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved state whose first moment is in 8 bits where that of ``fresh`` is, and in numbers elsewhere."""
    codes = EIGHT_BIT[0]
    if keys_of(fresh) == keys_of(saved):
        return saved
    if codes in saved:
        return {**saved, "exp_avg": numbers_of_moment(saved)}
    moment = placed_like(fresh[codes], saved["exp_avg"].to(fresh[codes].device))
    new = quantized(local(moment), saved["step"].item())
    return {**saved, **{key: rows_like(fresh[codes], part) for key, part in zip(EIGHT_BIT, new, strict=True)}}
