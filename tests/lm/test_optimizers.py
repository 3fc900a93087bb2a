"""Which optimizer trains what, and which norm it clips."""

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Muon

from coupled_adam import Adams, CoupledAdam
from coupled_adam.errors import InputError
from coupled_adam.lm.checkpoint import load_checkpoint, save_checkpoint
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.model import build_model
from coupled_adam.lm.optimizers import Optimizers, build_optimizers, state_bytes
from coupled_adam.lm.parallel import World


def built(tiny: Experiment, **settings) -> tuple:
    experiment = tiny.with_values(**{f"optimizer__{key}": value for key, value in settings.items()})
    model = build_model(experiment.model, 320, 16, seed=0)
    return model, build_optimizers(model, experiment), experiment


def loss(model) -> torch.Tensor:
    tokens = torch.randint(300, (4, 17), generator=torch.Generator().manual_seed(0))
    return model(tokens[:, :-1], tokens[:, 1:]).total / 64


@pytest.mark.parametrize(
    ("embedding", "core", "classes"),
    [
        ("adamw", "adamw", [AdamW]),
        ("coupled_adam", "adamw", [CoupledAdam]),
        ("adams", "adams", [Adams]),
        ("sgd", "adamw", [SGD, AdamW]),
        ("coupled_adam", "muon", [CoupledAdam, Muon, AdamW]),
        ("coupled_adam", "adams", [CoupledAdam, Adams]),
        ("adams", "adamw", [Adams, AdamW]),
    ],
)
def test_embedding_and_core_are_chosen_separately(tiny, embedding, core, classes) -> None:
    model, optimizers, experiment = built(tiny, embedding__name=embedding, core__name=core)
    assert [type(o) for o in optimizers.all] == classes
    given = [p for o in optimizers.all for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, given)) == sorted(id(p) for p in model.parameters()), "each parameter once"
    assert optimizers.all[0].param_groups[0]["params"][0] is model.head.weight
    assert optimizers.all[0].param_groups[0]["weight_decay"] == 0
    before = loss(model).item()
    for _ in range(12):
        optimizers.zero_grad()
        loss(model).backward()
        optimizers.step(1e-2)
    assert loss(model).item() < before - 0.1
    held = sum(x.numel() * 4 for o in optimizers.all for s in o.state.values() for k, x in s.items() if k != "step")
    assert held == pytest.approx(state_bytes(experiment, model), rel=0.02)


@pytest.mark.parametrize("embedding", ["adamw", "coupled_adam", "sgd"])
def test_the_norm_is_that_of_all_gradients(tiny, embedding) -> None:
    model, optimizers, _ = built(tiny, embedding__name=embedding)
    loss(model).backward()
    expected = clip_grad_norm_(model.parameters(), float("inf"))
    torch.testing.assert_close(optimizers.step(0.0), expected)


def test_the_embedding_may_have_a_multiple_of_the_learning_rate(tiny) -> None:
    model, optimizers, _ = built(tiny, embedding__name="sgd", embedding__lr_factor=300.0, embedding__momentum=0.5)
    assert isinstance(optimizers, Optimizers)
    loss(model).backward()
    optimizers.step(1e-3)
    assert [group["lr"] for o in optimizers.all for group in o.param_groups] == pytest.approx([0.3, 1e-3, 1e-3])
    assert optimizers.all[0].param_groups[0]["momentum"] == 0.5


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("embedding", ["adamw", "coupled_adam", "sgd", "adam_variant"])
def test_a_checkpoint_goes_on_with_the_multiple_of_the_learning_rate(tiny, tmp_path, embedding, older) -> None:
    """Also one whose groups have no ``lr_factor``, as they had none once."""
    settings = {"embedding__name": embedding, "embedding__lr_factor": 30.0}
    model, optimizers, _ = built(tiny, **settings)
    loss(model).backward()
    optimizers.step(1e-3)
    for group in optimizers.all[0].param_groups if older else ():
        del group["lr_factor"]
    path = save_checkpoint(tmp_path, 1, model, optimizers.all, {}, World())
    model, optimizers, _ = built(tiny, **settings)
    load_checkpoint(path, model, optimizers.all, World())
    loss(model).backward()
    optimizers.step(1e-3)
    assert [group["lr"] for o in optimizers.all for group in o.param_groups] == pytest.approx([0.03, 1e-3, 1e-3])


@pytest.mark.parametrize(
    ("embedding", "core", "others"),
    [
        ("adamw", "adamw", {}),
        ("coupled_adam", "adamw", {}),
        ("coupled_adam", "adamw", {"embedding__lr_factor": 3.0}),
        ("adams", "adams", {}),
        ("sgd", "adamw", {}),
        ("coupled_adam", "muon", {}),
    ],
)
def test_a_centered_embedding_has_the_mean_0_after_every_step(tiny, embedding, core, others) -> None:
    names = {"embedding__name": embedding, "core__name": core, **others}
    model, optimizers, _ = built(tiny, **names, embedding__center=True)
    plain, other, _ = built(tiny, **names)
    assert model.head.weight.mean(0).norm() > 1e-4, "not before the first"
    before = model.head.weight.clone()
    loss(model).backward()
    optimizers.step(0.0)
    assert torch.equal(model.head.weight, before), "nor by a step that moves nothing"
    model, optimizers, _ = built(tiny, **names, embedding__center=True)
    for step in range(2):
        for network, some in ((model, optimizers), (plain, other)):
            some.zero_grad()
            loss(network).backward()
            some.step(1e-2)
        assert model.head.weight.mean(0).abs().max() < 1e-8
        if step == 0:
            weight = plain.head.weight
            torch.testing.assert_close(model.head.weight, weight - weight.mean(0), rtol=0, atol=1e-7)
    assert plain.head.weight.mean(0).norm() > 1e-4
    assert model.head.weight.norm() > 0.5 * plain.head.weight.norm(), "the rows are still there"


def part(tensor: torch.Tensor, qkv: str) -> list[torch.Tensor]:
    """The matrices that a fused weight, or its gradient, consists of."""
    return [*tensor.detach().chunk(3 if qkv == "split" else 6)]


@pytest.mark.parametrize(("core", "qkv"), [("muon", "split"), ("adams", "split"), ("adams", "heads")])
def test_separate_queries_keys_and_values_take_the_steps_of_separate_matrices(tiny, core, qkv) -> None:
    settings = {"optimizer__core__name": core, "train__max_grad_norm": 1e9}
    experiment = tiny.with_values(**settings, model__qkv=qkv)
    models = [build_model(tiny.with_values(model__qkv=how).model, 320, 16, seed=0) for how in ("fused", qkv)]
    fused, parted = models
    optimizers = [build_optimizers(model, experiment) for model in models]
    alone = [nn.Parameter(matrix.clone()) for matrix in part(fused.blocks[0].attention.qkv.weight, qkv)]
    if core == "muon":
        separate = Muon(alone, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    else:
        separate = Adams(alone, weight_decay=0.1)
    separate.param_groups[0]["lr"] = 1e-2
    for step in range(4):
        for model in models:
            model.zero_grad()
            loss(model).backward()
        gradient = torch.cat([p.grad.flatten(0, -2) for p in parted.blocks[0].attention.qkv.parameters()])
        if step == 0:
            assert torch.equal(gradient, fused.blocks[0].attention.qkv.weight.grad), "the models begin as one"
        for p, g in zip(alone, part(gradient, qkv), strict=True):
            p.grad = g.clone()
        separate.step()
        for each in optimizers:
            each.step(1e-2)
        found = torch.cat([p.detach().flatten(0, -2) for p in parted.blocks[0].attention.qkv.parameters()])
        expected = torch.cat([p.detach() for p in alone])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert (fused.blocks[0].attention.qkv.weight - found).abs().max() > 1e-4, "one fused matrix takes other steps"


@pytest.mark.parametrize("qkv", ["split", "heads"])
def test_to_an_elementwise_optimizer_separate_queries_keys_and_values_are_the_same_run(tiny, qkv) -> None:
    weights = []
    for how in ("fused", qkv):
        experiment = tiny.with_values(model__qkv=how)
        model = build_model(experiment.model, 320, 16, seed=0)
        optimizers = build_optimizers(model, experiment)
        for _ in range(5):
            optimizers.zero_grad()
            loss(model).backward()
            optimizers.step(1e-2)
        weights.append(torch.cat([p.detach().flatten() for p in model.blocks[1].attention.qkv.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_a_torch_without_muon_is_told_so(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(InputError, match=r"'muon' needs torch 2\.9 or newer, this is .*another core optimizer"):
        built(tiny, core__name="muon")
