"""What an optimizer is said to do is what it does."""

import pytest
import torch
from torch import nn

from coupled_adam import Adams, Adams_ZeRO, CoupledAdam, describe, param_groups
from coupled_adam.lm.config import Model
from coupled_adam.lm.model import build_model


def model() -> nn.Module:
    return build_model(Model(n_layers=2, n_heads=2, hidden_size=8), vocab_size=64, sequence_length=4, seed=0)


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def test_every_role_is_told() -> None:
    lines = describe(CoupledAdam(param_groups(model(), weight_decay=0.1), max_grad_norm=0.5)).splitlines()
    assert lines[0] == "CoupledAdam"
    assert lines[1] == "  coupled over the vocabulary: token_embedding.weight (64, 8), weight decay 0"
    assert lines[2].startswith("  weight decay 0.1: 9 matrices, ")
    assert lines[3].startswith("  weight decay 0: ") and "vectors and scalars" in lines[3]
    assert lines[-1] == "  clipping by this optimizer: to a global norm of 0.5; do not clip elsewhere"


def test_adams_tells_spectral_decay_and_whom_it_spares() -> None:
    table, matrix, vector = (nn.Parameter(torch.randn(s)) for s in ((9, 4), (4, 4), (4,)))
    table.use_spectral_decay = False
    text = describe(Adams([table, matrix, vector], weight_decay=0.2, scalar_vector_weight_decay=0.3))
    assert "  coupled over the vocabulary: nothing" in text
    assert "  weight decay 0.3: 1 matrix and 1 vectors and scalars, 40 elements" in text
    assert "  spectral decay 0.2: 1 matrix, 16 elements" in text


def test_matrices_without_decay_are_named() -> None:
    groups = [{"params": [nn.Parameter(torch.randn(9, 4))], "second_moment": "vocabulary"}]
    groups.append({"params": [(f"m{i}", nn.Parameter(torch.randn(4, 4))) for i in range(5)]})
    groups[0]["params"] = [("head", groups[0]["params"][0])]
    assert "  weight decay 0: 5 matrices (m0, m1, m2, …), 80 elements" in describe(CoupledAdam(groups))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"exp_avg_dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("cls", [CoupledAdam, Adams])
def test_the_bytes_foretold_are_those_of_the_state(cls, options, dtype) -> None:
    # Kernels take seconds to compile.
    optimizer = cls(param_groups(model().to(dtype)), fused=False, **options)
    foretold = describe(optimizer)
    actual = sum(x.nbytes for state in stepped(optimizer).state.values() for x in state.values())
    assert describe(optimizer) == foretold
    assert f"state: {actual / 1000:.1f} kB; uncoupled it would be" in foretold


def test_uncoupled_it_would_be_that_much() -> None:
    groups = param_groups(model())
    text = describe(CoupledAdam(groups))
    adamw = stepped(torch.optim.AdamW(groups))
    actual = sum(x.nbytes for state in adamw.state.values() for x in state.values())
    assert text.splitlines()[-2].endswith(f"uncoupled it would be {actual / 1000:.1f} kB")


def test_zero_tells_its_state_when_it_has_one() -> None:
    optimizer = Adams_ZeRO(param_groups(model()))
    assert "state: sharded across the processes in the first step" in describe(optimizer)
    actual = sum(x.nbytes for state in stepped(optimizer).state.values() for x in state.values())
    assert f"state: {actual / 1000:.1f} kB" in describe(optimizer)


def test_other_optimizers_are_refused() -> None:
    with pytest.raises(TypeError, match="SGD is neither an optimizer of coupled_adam"):
        describe(torch.optim.SGD([nn.Parameter(torch.zeros(1))]))


@pytest.mark.parametrize("cls", [CoupledAdam, Adams, Adams_ZeRO])
def test_a_head_that_the_model_does_not_hold_any_more_is_told(cls) -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    optimizer = cls(param_groups(model, coupled=[model[1]]))
    model[1] = nn.Linear(4, 12)
    assert "no gradient" not in describe(optimizer)
    for _ in range(3):
        model(torch.tensor([1])).sum().backward()
        optimizer.step()
    assert "1.weight (9, 4), weight decay 0; no gradient in 3 steps: frozen, unused, or replaced" in describe(optimizer)
    model[1] = nn.Linear(4, 9)
    assert "no gradient" not in describe(stepped(cls(param_groups(model, coupled=[model[1]]))))
