"""From AdamW and back, from coupled to uncoupled, and from one vocabulary to another."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_harmless import OPTIMIZERS, H, Model, V, backward, made, same, snapshot, train
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedules

from coupled_adam import Adams, Adams_ZeRO, CoupledAdam, adamw_state_dict, name_checkpoint, param_groups
from coupled_adam.optim import reference

OPTIONS: list[dict[str, Any]] = [{}, {"exp_avg_dtype": torch.bfloat16}, {"exp_avg_dtype": "8bit"}]


def adamw_of(model: Model, which: str, **options: Any) -> torch.optim.AdamW:
    groups = param_groups(model, coupled=[model.head])
    if which == "the same groups":
        return torch.optim.AdamW([{**g, "params": [p for _, p in g["params"]]} for g in groups], **options)
    if which == "names":
        return torch.optim.AdamW([*model.named_parameters()][::-1], **options)
    return torch.optim.AdamW(model.parameters(), **options)


def continued(theta: Tensor, m: Tensor, v: Tensor, grads: list[Tensor], step: int, lr: float, decay: float) -> Tensor:
    """AdamW in float64 from given moments."""
    state = {"t": step, "m": m.double(), "v": v.double()}
    for g in grads:
        theta = reference.step(theta, g, state, lr=lr, weight_decay=decay)
    return theta


@pytest.mark.parametrize(
    "path", [{"foreach": True}, {"fused": True}, {"foreach": False}, {"capturable": False}], ids=str
)
@pytest.mark.parametrize("which", ["the same groups", "names", "one group"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_adamw_goes_on_where_coupled_adam_stood(options: dict, which: str, path: dict) -> None:
    model, optimizer = made(CoupledAdam, True, weight_decay=0.1, **options)
    train(model, optimizer)
    before = snapshot(model, optimizer)
    adamw = adamw_of(model, which, lr=1e-2, weight_decay=0.1, **path)
    state = adamw_state_dict(optimizer, None if which == "the same groups" else adamw)
    assert all(set(s) == {"step", "exp_avg", "exp_avg_sq"} for s in state["state"].values())
    assert all(
        set(g) <= {*torch.optim.AdamW([torch.zeros(1)]).param_groups[0], "param_names"} for g in state["param_groups"]
    )
    adamw.load_state_dict(state)
    groups = {id(p): group for group in adamw.param_groups for p in group["params"]}
    expected, grads = [], {}
    for name, p in model.named_parameters():
        grads[name] = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        square = optimizer.state[p]["exp_avg_sq"].expand(p.shape)
        args = (p.detach(), optimizer.first_moment(p), square, grads[name], 3, 1e-2, groups[id(p)]["weight_decay"])
        expected.append(continued(*args))
    for i in range(3):
        for name, p in model.named_parameters():
            p.grad = grads[name][i]
        adamw.step()
    for p, exact in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach().double(), exact, rtol=1e-5, atol=1e-6)
    moments = [x for p in model.parameters() for x in optimizer.state[p].values()]
    kept = [x for x in before if any(x.shape == y.shape and torch.equal(x, y) for y in moments)]
    assert len(kept) >= len(moments), "the coupled optimizer's state is left as it was"


def test_other_models_are_matched_by_name_or_refused() -> None:
    model, optimizer = made(CoupledAdam)
    train(model, optimizer)
    other = Model()
    adamw = torch.optim.AdamW([*other.named_parameters()][::-1])
    adamw.load_state_dict(adamw_state_dict(optimizer, adamw))
    assert torch.equal(adamw.state[other.inner.bias]["exp_avg"], optimizer.state[model.inner.bias]["exp_avg"])
    with pytest.raises(ValueError, match=r"no names.*named_parameters"):
        adamw_state_dict(optimizer, torch.optim.AdamW(other.parameters()))
    with pytest.raises(ValueError, match=r"'head.weight' is in one"):
        adamw_state_dict(optimizer, torch.optim.AdamW([*other.named_parameters()][:-1]))
    narrow = [(name, nn.Parameter(torch.zeros(3))) for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=r"has shape \(37, 16\), but \(3,\) in the other optimizer"):
        adamw_state_dict(optimizer, torch.optim.AdamW(narrow))
    with pytest.raises(ValueError, match="amsgrad=False"):
        adamw_state_dict(optimizer, torch.optim.AdamW(model.parameters(), amsgrad=True))


@pytest.mark.parametrize("cls", [Adams, Adams_ZeRO])
def test_adams_has_no_way_to_adamw_and_says_so(cls: type) -> None:
    model, optimizer = made(cls)
    train(model, optimizer)
    with pytest.raises(ValueError, match=r"'head.weight' is trained by Adams.*direction='atan2'.*with fresh state"):
        adamw_state_dict(optimizer)


SCHEDULES: dict[str, Callable[[Optimizer], schedules.LRScheduler]] = {
    "lambda": lambda optimizer: schedules.LambdaLR(optimizer, lambda step: min((step + 1) / 4, 1.0) * 0.9**step),
    "cosine": lambda optimizer: schedules.CosineAnnealingLR(optimizer, 20, 1e-4),
    "exponential": lambda optimizer: schedules.ExponentialLR(optimizer, 0.9),
    "two parts": lambda optimizer: schedules.SequentialLR(
        optimizer, [schedules.LinearLR(optimizer, 0.1, 1.0, 4), schedules.ExponentialLR(optimizer, 0.9)], [4]
    ),
    "one cycle": lambda optimizer: schedules.OneCycleLR(optimizer, 1e-2, 20),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.filterwarnings("ignore:Detected call of", "ignore:The epoch parameter")
def test_a_schedule_that_is_stepped_forward_goes_on_after_a_switch(kind: str) -> None:
    """As docs/migration.md has it."""
    model, _ = made(CoupledAdam)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    old = SCHEDULES[kind](adamw)
    for i in range(7):
        train(model, adamw, range(i, i + 1))
        old.step()
    optimizer = CoupledAdam(param_groups(model, coupled=[model.head]), lr=adamw.param_groups[0]["initial_lr"])
    optimizer.load_state_dict(name_checkpoint(model, adamw))
    new = SCHEDULES[kind](optimizer)
    for _ in range(old.last_epoch):
        new.step()
    for _ in range(5):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([adamw.param_groups[0]["lr"]] * len(rates), rel=1e-12)
        old.step()
        new.step()


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_schedule_is_built_before_the_state_is_loaded(kind: str) -> None:
    """As docs/troubleshooting.md has it: most, built afterwards, set the rates anew."""
    model, optimizer = made(CoupledAdam)
    schedule = SCHEDULES[kind](optimizer)
    for i in range(6):
        train(model, optimizer, range(i, i + 1))
        schedule.step()
    first, later = (made(CoupledAdam)[1] for _ in range(2))
    before = SCHEDULES[kind](first)
    first.load_state_dict(optimizer.state_dict())
    later.load_state_dict(optimizer.state_dict())
    after = SCHEDULES[kind](later)
    for built in (before, after):
        built.load_state_dict(schedule.state_dict())
    now, resumed, jumped = ([group["lr"] for group in o.param_groups] for o in (optimizer, first, later))
    assert resumed == now
    if kind == "lambda":
        assert jumped != now


def test_a_schedule_and_a_model_without_state_come_along() -> None:
    model, optimizer = made(CoupledAdam)
    torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5)
    state = adamw_state_dict(optimizer)
    assert state["state"] == {} and state["param_groups"][0]["initial_lr"] == 1e-2
    adamw_of(model, "the same groups").load_state_dict(state)


# ---------------------------------------------------------------------------------------------- coupled and uncoupled

LAYOUTS = {"none": [], "head": ["head"], "both": ["head", "embedding"]}


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("start", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:nothing is coupled")
def test_coupled_state_unfolds_and_uncoupled_state_folds(cls: type, options: dict, start: str, to: str) -> None:
    model = Model()
    for embedding in (model.head.weight, model.embedding.weight):
        embedding.use_spectral_decay = False

    def make(layout: str) -> Any:
        return cls(param_groups(model, coupled=[getattr(model, name) for name in LAYOUTS[layout]]), lr=1e-2, **options)

    one = make(start)
    train(model, one)
    other = make(to)
    other.load_state_dict(one.state_dict())
    for name, p in model.named_parameters():
        coupled = name.split(".")[0] in LAYOUTS[to]
        square, before = other.state[p]["exp_avg_sq"], one.state[p]["exp_avg_sq"]
        assert square.shape == ((1, *p.shape[1:]) if coupled else p.shape)
        expected = before.mean(0, keepdim=True) if coupled else before.expand(p.shape)
        torch.testing.assert_close(square, expected)
        assert square.is_contiguous() and square.untyped_storage().nbytes() == square.nbytes
        if one.state[p].keys() == other.state[p].keys():
            assert torch.equal(other.first_moment(p), one.first_moment(p))
    train(model, other, range(3, 6))
    assert all(p.isfinite().all() for p in model.parameters())


# --------------------------------------------------------------------------------------------------- added tokens


def resized(model: Model, rows: int, tied: bool) -> Model:
    """The model with another vocabulary, as resize_token_embeddings makes it."""
    other = copy.deepcopy(model)
    for name in ("head", "embedding"):
        old = getattr(model, name).weight.detach()
        new = torch.cat([old[:rows], torch.full((max(rows - V, 0), H), 0.01, dtype=old.dtype)])
        getattr(other, name).weight = nn.Parameter(new)
    if tied:
        other.embedding.weight = other.head.weight
    return other


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [V + 3, V - 3, V + 300])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_checkpoint_of_another_vocabulary_resumes(cls: type, options: dict, rows: int, tied: bool) -> None:
    model = Model()
    if tied:
        model.embedding.weight = model.head.weight
    _, optimizer = made(cls, model=model, **options)
    train(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    larger = resized(model, rows, tied)
    _, resumed = made(cls, model=larger, **options)
    with pytest.raises(ValueError, match=rf"\(37, 16\), not \({rows}, 16\); if tokens.*resize_vocabulary=True"):
        resumed.load_state_dict(saved)
    assert not resumed.state
    weights = [p.detach().clone() for p in larger.parameters()]
    resumed.load_state_dict(saved, resize_vocabulary=True)
    assert all(map(torch.equal, weights, larger.parameters()))
    head, before = larger.head.weight, optimizer.state[model.head.weight]
    moment, old = resumed.first_moment(head), optimizer.first_moment(model.head.weight)
    assert moment.shape == (rows, H) and torch.equal(moment[:V], old[:rows]) and not moment[V:].any()
    assert torch.equal(resumed.state[head]["exp_avg_sq"], before["exp_avg_sq"])
    assert resumed.state[head]["step"] == 3
    if not tied:
        square = resumed.state[larger.embedding.weight]["exp_avg_sq"]
        whole = optimizer.state[model.embedding.weight]["exp_avg_sq"]
        assert torch.equal(square[:V], whole[:rows])
        torch.testing.assert_close(square[V:], whole.mean(0, keepdim=True).expand(len(square[V:]), H))
    assert torch.equal(resumed.state[larger.inner.weight]["exp_avg"], optimizer.state[model.inner.weight]["exp_avg"])
    if rows < V:
        return
    train(larger, resumed, range(3, 6))
    assert all(p.isfinite().all() for p in larger.parameters())


def test_resizing_is_for_one_vocabulary_alone() -> None:
    model, optimizer = made(CoupledAdam)
    train(model, optimizer)
    other = resized(model, 40, tied=False)
    other.embedding.weight = nn.Parameter(torch.zeros(50, H))
    with pytest.raises(
        ValueError, match=r"from 37 to 40 rows .*'head.weight'.*from 37 to 50 rows .*'embedding.weight'"
    ):
        made(CoupledAdam, model=other)[1].load_state_dict(optimizer.state_dict(), resize_vocabulary=True)
    same_size = made(CoupledAdam, model=copy.deepcopy(model))[1]
    same_size.load_state_dict(optimizer.state_dict(), resize_vocabulary=True)
    for a, b in zip(optimizer.state.values(), same_size.state.values(), strict=True):
        assert all(map(torch.equal, a.values(), b.values()))
    wider = Model()
    wider.head.weight = nn.Parameter(torch.zeros(V, H + 1))
    with pytest.raises(ValueError, match="another model"):
        made(CoupledAdam, model=wider)[1].load_state_dict(optimizer.state_dict(), resize_vocabulary=True)


# ------------------------------------------------------------------------------------------ what a checkpoint may hold


@pytest.mark.parametrize("number", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_checkpoint_with_moments_that_no_step_can_use_is_warned_of(cls: type, number: float) -> None:
    model, optimizer = made(cls)
    train(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
    for state in saved["state"].values():
        state["exp_avg_sq"].view(-1)[3] = number
    with pytest.warns(UserWarning, match=r"exp_avg_sq of parameter 'head.weight'.*earlier checkpoint"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("step", [None, "3", torch.zeros(2), math.nan], ids=str)
def test_a_step_that_is_no_number_is_refused_by_name(step: Any) -> None:
    model, optimizer = made(CoupledAdam)
    train(model, optimizer)
    before = snapshot(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = step
    with pytest.raises(ValueError, match=r"step of parameter 'head.weight'"):
        optimizer.load_state_dict(saved)
    assert same(before, snapshot(model, optimizer))


FOREIGN = [
    "apply_weight_decay",
    "no_weight_decay",
    "weight_decay_mult",
    "base_weight_decay",
    "grad_norm",
    "wd",
    "lr_scale",
]


@pytest.mark.parametrize("key", [*FOREIGN, "beta1", "centered", "weight_decay_"])
@pytest.mark.parametrize("cls", [CoupledAdam, torch.optim.AdamW])
def test_keys_of_others_in_a_checkpoint_are_let_alone(cls: type, key: str) -> None:
    model = Model()
    one = cls(param_groups(model, coupled=[model.head]))
    train(model, one)
    saved = copy.deepcopy(one.state_dict())
    for group in saved["param_groups"]:
        group[key] = 1
    _, optimizer = made(CoupledAdam, model=model)
    optimizer.load_state_dict(saved)
    train(model, optimizer, range(3, 5))
    assert optimizer.param_groups[0][key] == 1


def test_only_near_misses_in_a_group_are_taken_for_mistakes() -> None:
    for key in FOREIGN:
        CoupledAdam([{"params": [nn.Parameter(torch.zeros(3))], key: 1}], coupling_factor=0.1)
    for key, meant in {
        "weigth_decay": "weight_decay",
        "weight_deca": "weight_decay",
        "wieght_dcay": None,
        "esp": "eps",
        "beta": "betas",
        "centre": "center",
        "Center": "center",
        "coupling-scale": "coupling_scale",
        "secondmoment": "second_moment",
    }.items():
        if meant is None:
            continue
        with pytest.raises(ValueError, match=f"'{key}' in a param group; did you mean '{meant}'"):
            CoupledAdam([{"params": [nn.Parameter(torch.zeros(3))], key: 1}], coupling_factor=0.1)


# ------------------------------------------------------------------------------------------------ arguments of AdamW


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_checkpoint_with_the_former_name_of_a_key_goes_on_as_if_it_had_the_new_one(cls: type, options: dict) -> None:
    model, optimizer = made(cls, True, **options)
    train(model, optimizer)
    saved = optimizer.state_dict()
    assert {"exp_avg_dtype", "fused"} <= saved["param_groups"][0].keys()
    former = copy.deepcopy(saved)
    for group in former["param_groups"]:
        group["state_dtype"] = group.pop("exp_avg_dtype")
        del group["fused"]
    outcomes = []
    for state in (saved, former):
        other, loaded = made(cls, True, copy.deepcopy(model), **options)
        loaded.load_state_dict(state)
        assert all("state_dtype" not in group and group["fused"] is None for group in loaded.param_groups)
        train(other, loaded, range(3, 6))
        outcomes.append(snapshot(other, loaded))
    assert same(*outcomes)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_distributed_checkpoint_without_newer_settings_loads_in_part(cls: type, options: dict, tmp_path) -> None:
    model, optimizer = made(cls, **options)
    train(model, optimizer)
    content = get_optimizer_state_dict(model, optimizer)
    for group in content["param_groups"]:
        group["state_dtype"] = group.pop("exp_avg_dtype")
        del group["fused"]
    checkpoint.save({"optimizer": content}, checkpoint_id=tmp_path, no_dist=True)
    other, loaded = made(cls, True, copy.deepcopy(model), **options)
    content = get_optimizer_state_dict(other, loaded)
    planner = checkpoint.DefaultLoadPlanner(allow_partial_load=True)
    checkpoint.load({"optimizer": content}, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    set_optimizer_state_dict(other, loaded, content)
    assert same(snapshot(model, optimizer), snapshot(other, loaded))


@pytest.mark.parametrize("cls", [CoupledAdam, Adams])
def test_a_call_that_was_written_for_adamw_works(cls: type) -> None:
    outcomes = []
    for flags in ({}, {"fused": True}, {"fused": None, "foreach": False, "amsgrad": False, "differentiable": False}):
        model, optimizer = made(cls, **flags)
        train(model, optimizer)
        outcomes.append(snapshot(model, optimizer))
    assert same(outcomes[0], outcomes[1]) and same(outcomes[0], outcomes[2])


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"amsgrad": True}, ValueError, "Invalid amsgrad: True; it is not supported"),
        ({"differentiable": True}, ValueError, "Invalid differentiable: True; it is not supported"),
        ({"fused": "yes"}, TypeError, "Invalid fused: 'yes'"),
        ({"foreach": 3}, TypeError, "Invalid foreach: 3"),
    ],
)
@pytest.mark.parametrize("cls", [CoupledAdam, Adams])
def test_what_adamw_can_and_we_cannot_is_refused(cls: type, flags: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        made(cls, **flags)
    _, optimizer = made(cls)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [("extra", nn.Parameter(torch.zeros(3)))], **flags})
    backward(Model(), 0)
