"""Names for a checkpoint of AdamW: every moment comes to its parameter, or the checkpoint is refused."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.optim import AdamW

from coupled_adam import CoupledAdam, name_checkpoint, param_groups


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 10), nn.Linear(10, 6, bias=False)


class Model(nn.Module):
    """Untied, with biases, a norm that is no LayerNorm, and a scale that no name gives away."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(12, 6), nn.ModuleList([Block(), Block()])
        self.rms_norm, self.scale = nn.RMSNorm(6), nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 12, bias=False)


def trained(model: nn.Module, groups: Any) -> AdamW:
    """An AdamW with different moments everywhere."""
    optimizer = AdamW(groups)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    return optimizer


def split(model: nn.Module, is_decayed: Callable[[str, Tensor], bool]) -> list[dict[str, Any]]:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [{"params": [p for n, p in named if is_decayed(n, p) is wanted]} for wanted in (True, False)]


def trainers(model: nn.Module) -> list[dict[str, Any]]:
    decayed = transformers.Trainer.get_decay_parameter_names(None, model)
    return split(model, lambda n, _: n in decayed)


BUILT = {
    "model.parameters()": lambda m: m.parameters(),
    "trainable parameters": lambda m: [p for p in m.parameters() if p.requires_grad],
    "nanoGPT": lambda m: split(m, lambda _, p: p.dim() >= 2),
    "vectors first": lambda m: split(m, lambda _, p: p.dim() < 2),
    "Trainer": trainers,
    "older examples": lambda m: split(m, lambda n, _: not any(x in n for x in ("bias", "LayerNorm.weight"))),
}


def assert_every_moment_is_its_own(optimizer: CoupledAdam, adamw: AdamW, model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.equal(optimizer.state[p]["exp_avg"], adamw.state[p]["exp_avg"]), name
            square = adamw.state[p]["exp_avg_sq"]
            expected = square.mean(0, keepdim=True) if name == "head.weight" else square
            torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], expected, msg=name)


@pytest.mark.parametrize("frozen", [None, "embed", "blocks"])
@pytest.mark.parametrize("given", ["optimizer", "state dict"])
@pytest.mark.parametrize("groups", BUILT.values(), ids=BUILT)
def test_a_running_adamw_goes_on_as_coupled_adam(groups, given, frozen) -> None:
    model = Model()
    if frozen:
        getattr(model, frozen).requires_grad_(False)
    adamw = trained(model, groups(model))
    before = [dict(group) for group in adamw.state_dict()["param_groups"]]
    optimizer = CoupledAdam(param_groups(model, coupled="head"))
    optimizer.load_state_dict(name_checkpoint(model, adamw if given == "optimizer" else adamw.state_dict()))
    assert adamw.state_dict()["param_groups"] == before
    assert_every_moment_is_its_own(optimizer, adamw, model)


def test_any_groups_are_named_of_an_optimizer() -> None:
    model = Model()
    params = list(model.parameters())[::-1]
    adamw = trained(model, [{"params": params[:3]}, {"params": params[5:]}, {"params": params[3:5]}])
    optimizer = CoupledAdam(param_groups(torch.compile(model), coupled="head"))
    optimizer.load_state_dict(name_checkpoint(model, adamw))
    assert_every_moment_is_its_own(optimizer, adamw, model)
    message = r"groups of \[3, \d+, 2\] parameters, but the known layouts .* are: .*name_checkpoint\(model, adamw\)"
    with pytest.raises(ValueError, match=message):
        name_checkpoint(model, adamw.state_dict())
    with pytest.raises(ValueError, match=r"parameter 0 of group 0, of shape .*is not in this Model"):
        name_checkpoint(Model(), adamw)


def test_a_checkpoint_with_names_stays_as_it_is() -> None:
    model = Model()
    saved = trained(model, model.named_parameters()).state_dict()
    assert name_checkpoint(model, saved) == saved


def test_moments_of_another_shape_are_named() -> None:
    model, wider = Model(), Model()
    saved = trained(model, model.parameters()).state_dict()
    wider.head = nn.Linear(6, 13, bias=False)
    with pytest.raises(ValueError, match=r"'head.weight' has shape \(13, 6\), but the moment in its place \(12, 6\)"):
        name_checkpoint(wider, saved)


def test_groups_that_may_be_two_things_are_refused() -> None:
    """The Trainer decays ``a`` and not ``norm.weight``, which is the other way around by shape."""
    model = nn.ModuleDict({"norm": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model.register_parameter("scale", nn.Parameter(torch.ones(4)))
    model.register_parameter("bias", nn.Parameter(torch.ones(4)))
    saved = AdamW(split(model, lambda _, p: p.ndim >= 2)).state_dict()  # without moments, whose shapes would tell
    with pytest.raises(
        ValueError, match=r"groups of \[2, 2\] parameters fit more than one layout: .* or .*pass that optimizer"
    ):
        name_checkpoint(model, saved)


@pytest.mark.parametrize("given", [{"model": {}, "optimizer": {}}, [], None, {}])
def test_what_is_no_state_dict_is_told(given) -> None:
    with pytest.raises(ValueError, match=re.escape("takes an optimizer or its state_dict(), with 'state' and")):
        name_checkpoint(Model(), given)


@pytest.mark.parametrize("name", ["Bert", "Llama", "GPT2", "T5", "Qwen3", "Gemma3Text", "ModernBert", "Mamba"])
def test_the_groups_of_the_trainer_are_known(name) -> None:
    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")()
        model = transformers.AutoModel.from_config(config)
    adamw = AdamW(trainers(model))
    assert name_checkpoint(model, adamw.state_dict()) == name_checkpoint(model, adamw)
