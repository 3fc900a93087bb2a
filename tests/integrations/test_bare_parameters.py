"""Trainers that hand over ``model.parameters()``: the matrix of the vocabulary is found, never guessed."""

import pytest
import torch
from torch import Tensor, nn

from coupled_adam import CoupledAdam
from coupled_adam.integrations.bare_parameters import VocabularyCoupledAdam


def model(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    built = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 50, bias=False))
    if tied:
        built[3].weight = built[0].weight
    return built


def groups(optimizer: VocabularyCoupledAdam) -> list[tuple[list[tuple[int, ...]], str, float]]:
    return [
        ([tuple(p.shape) for p in g["params"]], g["second_moment"], g["weight_decay"]) for g in optimizer.param_groups
    ]


def test_the_step_is_that_of_the_groups_written_out() -> None:
    ours, reference = model(), model()
    optimizers = [
        VocabularyCoupledAdam(ours.parameters(), 50, "last", lr=1e-2, betas=[0.9, 0.95], weight_decay=0.1),
        CoupledAdam(
            [
                {"params": [reference[3].weight], "second_moment": "vocabulary", "weight_decay": 0.0},
                {"params": [reference[0].weight, reference[1].weight], "weight_decay": 0.1},
                {"params": [reference[1].bias, *reference[2].parameters()], "weight_decay": 0.0},
            ],
            lr=1e-2,
            betas=(0.9, 0.95),
        ),
    ]
    for step in range(4):
        tokens = torch.randint(50, (16,), generator=torch.Generator().manual_seed(step))
        for each, optimizer in zip((ours, reference), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(each(tokens), tokens).backward()
            optimizer.step()
    for name, p in reference.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("factor", [0.1, 30.0])
@pytest.mark.parametrize(
    "options", [{}, {"eps": 1e-2}, {"coupling_scale": 0.25}, {"coupling_factor": 0.1}, {"row_exponent": 0.5}], ids=str
)
def test_longer_steps_of_the_embedding_are_those_of_another_learning_rate(options: dict, factor: float) -> None:
    """Though all groups are given the same rate in every step, as litgpt's loop does it."""
    ours, reference = model().double(), model().double()
    bare = VocabularyCoupledAdam(ours.parameters(), 50, "last", lr=1e-2, embedding_lr_factor=factor, **options)
    assert {group["lr"] for group in bare.param_groups} == {1e-2}
    optimizer = CoupledAdam(
        [
            {"params": [reference[3].weight], "second_moment": "vocabulary", "lr_factor": factor},
            {"params": [p for p in reference.parameters() if p is not reference[3].weight]},
        ],
        lr=1e-2,
        **options,
    )
    for step in range(4):
        lr = 1e-2 / (step + 1)
        for group in bare.param_groups:
            group["lr"] = lr
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        tokens = torch.randint(50, (16,), generator=torch.Generator().manual_seed(step))
        for each, one in ((ours, bare), (reference, optimizer)):
            one.zero_grad()
            nn.functional.cross_entropy(each(tokens), tokens).backward()
            one.step()
    for name, p in reference.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize(("factor", "error"), [(0, ValueError), (float("nan"), ValueError), ("10", TypeError)])
def test_a_factor_that_cannot_be_is_refused(factor: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="Invalid embedding_lr_factor"):
        VocabularyCoupledAdam(model().parameters(), 50, "last", embedding_lr_factor=factor)


def test_which_of_two_is_said() -> None:
    assert groups(VocabularyCoupledAdam(model().parameters(), 50, "all"))[0] == ([(50, 8)] * 2, "vocabulary", 0.0)
    for which, index in (("first", 0), ("last", 3)):
        untied = model()
        optimizer = VocabularyCoupledAdam(untied.named_parameters(), vocabulary_size=50, which=which)
        assert optimizer.param_groups[0]["params"] == [untied[index].weight]
        assert optimizer.param_groups[0]["param_names"] == [f"{index}.weight"]


def test_a_tied_matrix_needs_no_word() -> None:
    tied = model(tied=True)
    assert VocabularyCoupledAdam(tied.parameters(), 50).param_groups[0]["params"] == [tied[0].weight]


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        (None, {}, r"=50: several matrices.*parameter 0 \(50, 8\), parameter 5 \(50, 8\) of 6.*which='last'"),
        (None, {"vocabulary_size": 51}, r"=51: no trainable matrix has that many rows.*\(50, 8\).*including padding"),
        (None, {"which": "output"}, "Invalid which: 'output'; choose 'first', 'last' or 'all'"),
        ([nn.Parameter(torch.zeros(400))], {}, "FSDP1 and DeepSpeed flatten it"),
        ([{"params": [nn.Parameter(torch.zeros(50, 8))]}], {}, "not param groups"),
    ],
)
def test_it_never_guesses(params: list[Tensor] | None, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VocabularyCoupledAdam(model().parameters() if params is None else params, **{"vocabulary_size": 50} | options)


def test_a_frozen_matrix_is_none() -> None:
    frozen = model()
    frozen[0].requires_grad_(False)
    assert VocabularyCoupledAdam(frozen.parameters(), 50).param_groups[0]["params"] == [frozen[3].weight]
