"""A weight decay that no group takes is not lost in silence."""

import warnings

import pytest
import torch
from torch import nn

from coupled_adam import Adams, CoupledAdam, param_groups


def groups(**arguments: float) -> list[dict]:
    model = nn.Sequential(nn.Embedding(20, 4), nn.LayerNorm(4), nn.Linear(4, 20, bias=False))
    return param_groups(model, coupled=[model[2]], **arguments)


@pytest.mark.parametrize("optimizer", [CoupledAdam, Adams])
def test_a_decay_that_every_group_overrides_is_warned_of(optimizer: type) -> None:
    with pytest.warns(
        UserWarning, match=r"weight_decay=0.3 has no effect.*param_groups\(model, weight_decay=0.3\)"
    ) as told:
        built = optimizer(groups(), weight_decay=0.3)
    assert told[0].filename == __file__, "it points to the caller"
    assert 0.3 not in {group["weight_decay"] for group in built.param_groups}


@pytest.mark.parametrize("optimizer", [CoupledAdam, Adams])
def test_a_decay_that_some_group_has_is_not(optimizer: type) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer(groups(weight_decay=0.05))
        optimizer(groups(weight_decay=0.3), weight_decay=0.3)
        own = [{"params": [nn.Parameter(torch.zeros(4, 4))], "weight_decay": 0.0, "second_moment": "vocabulary"}]
        optimizer([*own, {"params": [nn.Parameter(torch.zeros(4, 4))]}], weight_decay=0.3)
