"""Centering: a step, and then the mean of the rows off every row, however the two are done in one."""

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jobs
import one_step
import pytest
import torch
from torch import Tensor, nn

from coupled_adam import Adams, Adams_ZeRO, CoupledAdam, center_, describe, param_groups
from coupled_adam.monitor import drift
from coupled_adam.optim.backends import cpu, gpu, plain
from coupled_adam.optim.state import job_of

STEPS = 8
SETTINGS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "coupled": (CoupledAdam, {}),
    "clipped": (CoupledAdam, {"max_grad_norm": 0.5}),
    "decay": (CoupledAdam, {"weight_decay": 0.3, "max_grad_norm": 0.5}),
    "maximize": (CoupledAdam, {"maximize": True, "coupling_scale": 0.25}),
    "factor": (CoupledAdam, {"coupling_factor": 0.3}),
    "tempered": (CoupledAdam, {"row_exponent": 0.5}),
    "clipped factor": (CoupledAdam, {"coupling_factor": 0.3, "max_grad_norm": 0.5}),
    "tensor lr": (CoupledAdam, {"lr": torch.tensor(0.02), "max_grad_norm": 0.5}),
    "adams": (Adams, {"max_grad_norm": 0.5}),
    "zero": (Adams_ZeRO, {"max_grad_norm": 0.5}),
}


def made(shape: tuple[int, int], dtype: torch.dtype = torch.float32, offset: float = 0.5) -> nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return nn.Parameter((torch.randn(shape, generator=generator, dtype=torch.float64) + offset).to(dtype))


def gradient(param: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return (torch.randn(param.shape, generator=generator, dtype=torch.float64) + 0.3).to(param.dtype)


def built(param: Tensor, kind: str, *, centers: bool, coupled: bool = True, **group: Any) -> Any:
    cls, options = SETTINGS[kind]
    moment = "vocabulary" if coupled else "elementwise"
    groups = [{"params": [param], "second_moment": moment, "center": centers, **group}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is coupled
        return cls(groups, **{"lr": 0.02, **options})


def trained(param: nn.Parameter, optimizer: Any, first: int = 0, steps: int = STEPS, after: Any = None) -> Tensor:
    for step in range(first, first + steps):
        param.grad = gradient(param, step)
        optimizer.step()
        if after is not None:
            after(param)
    return param.detach()


def exact(shape: tuple[int, int], kind: str, start: Tensor | None = None, **group: Any) -> Tensor:
    """What plain steps in float64 do, each with the mean taken off afterwards."""
    param = made(shape, torch.float64)

    @torch.no_grad()
    def take_off(param: Tensor) -> None:
        master = optimizer.state[param].get("master", param)
        master -= master.mean(0)
        param.copy_(master)

    options = {"master_dtype": torch.float64} if kind == "zero" else {}
    optimizer = built(param, kind, centers=False, **group)
    if options:
        optimizer.master_dtype = torch.float64
    return trained(param, optimizer, after=take_off)


@pytest.mark.parametrize("shape", [(300, 24), (1, 5), (70, 1), (5, 2100)], ids=str)
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_step_is_the_plain_one_with_the_mean_taken_off(
    kind: str, fused: bool | None, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "BLOCK_ELEMENTS", 1000)  # several blocks of rows
    for coupled in (True, False):
        expected = exact(shape, kind, coupled=coupled)
        for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
            param = made(shape, dtype)
            optimizer = built(param, kind, centers=True, coupled=coupled, fused=fused)
            if kind == "zero":
                optimizer.master_dtype = dtype
            found = trained(param, optimizer)
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_spectral_decay_and_a_bounded_direction_are_centered_too() -> None:
    for group in ({"direction": "ratio"}, {"decay": "decoupled"}, {}):
        expected = exact((30, 8), "adams", weight_decay=0.3, **group)
        found = trained(param := made((30, 8)), built(param, "adams", centers=True, weight_decay=0.3, **group))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("moment", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["coupled", "clipped", "adams"])
def test_the_mean_is_zero_to_rounding_after_every_step(
    kind: str, moment: torch.dtype | None, fused: bool | None
) -> None:
    for offset in (0.5, 100.0):
        param = made((700, 48), offset=offset)
        optimizer = built(param, kind, centers=True, exp_avg_dtype=moment, fused=fused)
        largest = param.detach().abs().max(0).values
        for step in range(50):
            trained(param, optimizer, step, 1)
            mean = param.detach().double().mean(0).abs()
            # A few roundings, of 2^-24 of the weights as they were; nothing adds up over the steps.
            assert (mean <= 2**-22 * largest).all(), (step, (mean / largest).max())
            largest = param.detach().abs().max(0).values


@pytest.mark.parametrize("moment", [None, torch.bfloat16])
def test_sums_that_a_step_keeps_are_those_of_what_it_has_written(moment: torch.dtype | None) -> None:
    for shape in ((1500, 24), (40, 2100), (1100, 1)):
        param = made(shape)
        optimizer = built(param, "clipped", centers=True, exp_avg_dtype=moment)
        trained(param, optimizer, steps=3)
        exp_avg = optimizer.state[param]["exp_avg"]
        kept = plain._kept[exp_avg][1]
        measured = cpu.measure(job_of(param, None, optimizer.state[param], optimizer.param_groups[0]))
        assert torch.equal(kept, measured), "to the bit, or a resumed run is another"
        exact_sums = torch.stack([x.detach().double().sum(0) for x in (param, exp_avg)])
        torch.testing.assert_close(kept, exact_sums, rtol=1e-5, atol=1e-4)


def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes every pass that only measures."""
    passes: list[int] = []
    real = cpu.measure
    monkeypatch.setattr(cpu, "measure", lambda *x: (passes.append(1), real(*x))[1])
    return passes


def test_steps_in_a_row_measure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = measured(monkeypatch)
    param = made((40, 8))
    optimizer = built(param, "clipped", centers=True)
    trained(param, optimizer)
    assert len(passes) == 1
    copied = copy.deepcopy(optimizer)
    trained(copied.param_groups[0]["params"][0], copied)
    assert len(passes) == 2
    before = len(passes)
    trained(other := made((40, 8)), built(other, "clipped", centers=False))
    assert len(passes) == before, "who does not center measures nothing"


CHANGES: dict[str, Callable[[nn.Parameter, Any], None]] = {
    "in place": lambda param, _: param.add_(1.0),
    "clamped moment": lambda param, optimizer: optimizer.state[param]["exp_avg"].mul_(0.5),
    "loaded": lambda param, _: nn.ParameterList([param]).load_state_dict({"0": torch.ones_like(param) + param}),
    "other memory": lambda param, _: setattr(param, "data", param.data + 1.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_from_outside_is_centered_in_the_next_step(change: str) -> None:
    param = made((300, 8))
    optimizer = built(param, "clipped", centers=True)
    for i in range(3):
        trained(param, optimizer, 3 * i, 3)
        with torch.no_grad():
            CHANGES[change](param, optimizer)
        trained(param, optimizer, 3 * i + 2, 1)
        assert param.detach().double().mean(0).abs().max() < 2**-23 * (param.abs().max() + 2)


def test_what_is_changed_past_the_version_counter_heals_in_the_second_step() -> None:
    param = made((300, 8))
    optimizer = built(param, "clipped", centers=True)
    trained(param, optimizer)
    param.data.add_(0.125)
    trained(param, optimizer, steps=1)
    torch.testing.assert_close(param.detach().mean(0), torch.full((8,), 0.125), rtol=1e-5, atol=0)
    trained(param, optimizer, steps=1)
    assert param.detach().double().mean(0).abs().max() < 2**-23 * param.abs().max()


@pytest.mark.parametrize("moment", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["coupled", "clipped", "clipped factor", "adams"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(kind: str, moment: torch.dtype | None) -> None:
    whole = made((700, 8))
    trained(whole, built(whole, kind, centers=True, exp_avg_dtype=moment), steps=6)
    param = made((700, 8))
    optimizer = built(param, kind, centers=True, exp_avg_dtype=moment)
    trained(param, optimizer, steps=3)
    resumed = nn.Parameter(param.detach().clone())
    other = built(resumed, kind, centers=True, exp_avg_dtype=moment)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["center"] = False  # what is computed is the new optimizer's own, as coupling is
    other.load_state_dict(saved)
    trained(resumed, other, first=3, steps=3)
    assert torch.equal(resumed, whole)


def test_only_the_mean_differs_from_a_run_without() -> None:
    # The gradients of an untied softmax head do not see the mean, nor does decay mix it with anything else.
    losses, heads = [], []
    for centers in (True, False):
        torch.manual_seed(0)
        body, head = nn.Embedding(40, 6).double(), nn.Linear(6, 40, bias=False).double()
        groups = param_groups(nn.Sequential(body, head), coupled=[head], center=centers)
        groups[0]["weight_decay"] = 0.2
        optimizer = CoupledAdam(groups, lr=0.05, max_grad_norm=0.5)
        for step in range(20):
            tokens = torch.randint(40, (30,), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(head(body(tokens)), tokens.roll(1))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        heads.append(head.weight.detach())
    assert losses[:20] == pytest.approx(losses[20:], abs=1e-12)
    assert heads[1].mean(0).norm() > 1e-3
    torch.testing.assert_close(heads[0], heads[1] - heads[1].mean(0), rtol=0, atol=1e-12)


def test_a_step_that_a_grad_scaler_skips_centers_nothing() -> None:
    param = made((20, 4))
    optimizer = built(param, "clipped", centers=True)
    trained(param, optimizer)
    before = param.detach().clone().add_(0.5)
    with torch.no_grad():
        param.copy_(before)
    param.grad = torch.full_like(param, float("inf"))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(param, before)


def test_a_parameter_without_a_gradient_stays_and_an_empty_matrix_is_no_trouble() -> None:
    still, empty = made((5, 4)), nn.Parameter(torch.zeros(0, 4))
    before = still.detach().clone()
    empty.grad = torch.zeros(0, 4)
    CoupledAdam([{"params": [still, empty], "second_moment": "vocabulary", "center": True}]).step()
    assert torch.equal(still, before) and empty.shape == (0, 4)


# ------------------------------------------------------------------------------------------------------------- center_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_center_takes_the_mean_off_in_place_and_unseen_by_autograd(dtype: torch.dtype) -> None:
    weight = made((200, 8), dtype, offset=3.0)
    before = weight.detach().double()
    assert center_(weight) is weight and weight.requires_grad and weight.is_leaf
    rounding = torch.finfo(dtype).eps * 8
    torch.testing.assert_close(weight.detach().double(), before - before.mean(0), rtol=0, atol=rounding)
    rows = made((6, 9)).detach()[:, ::2]
    center_(rows)
    assert rows.mean(0).abs().max() < 1e-6, "of any layout"


def test_what_has_no_rows_to_center_is_refused() -> None:
    with pytest.raises(ValueError, match=r"center_ takes a \(vocabulary, hidden\) matrix.*shape \(8,\)"):
        center_(torch.zeros(8))
    with pytest.raises(TypeError, match="floating-point matrix, not one of"):
        center_(torch.zeros(2, 2, dtype=torch.int64))
    for cls in (CoupledAdam, Adams):
        with pytest.raises(ValueError, match=r"'bias' has 1 dimension.*group without center"):
            cls([{"params": [("bias", nn.Parameter(torch.zeros(3)))], "center": True}])
        with pytest.raises(TypeError, match="Invalid center: 1; it must be True or False"):
            cls([{"params": [made((3, 2))], "center": 1}])
    param = made((4, 3))
    optimizer = built(param, "coupled", centers=True, coupled=False)
    param.data = param.data.flatten()
    param.grad = torch.zeros(12)
    with pytest.raises(RuntimeError, match="no rows to center"):
        optimizer.step()


@pytest.mark.parametrize("backend", [cpu, gpu, plain], ids=lambda m: m.__name__.split(".")[-1])
def test_a_kernel_checks_what_is_known_of_the_rows_where_it_touches_memory(backend) -> None:
    zero = torch.zeros(6, 4)
    for wrong in (torch.zeros(4, 5), torch.zeros(1, 4), torch.zeros(4)):
        made = one_step.job((zero, zero, zero, torch.ones(1, 4)), center=True)
        made.means = wrong
        with pytest.raises(RuntimeError, match="do not fit together"):
            backend.move([made])
    short = torch.zeros(5, 4)
    for grad, exp_avg in ((zero, short), (short, zero)):
        made = one_step.job((zero, grad, exp_avg, torch.ones(1, 4)), center=True)
        with pytest.raises(RuntimeError, match="do not fit together"):
            backend.sums(made)


@pytest.mark.parametrize("backend", [cpu, gpu], ids=lambda m: m.__name__.split(".")[-1])
@pytest.mark.parametrize("wrong", [torch.zeros(1, 5), torch.zeros(2, 4), torch.zeros(1, 4, dtype=torch.float64)])
def test_a_kernel_takes_no_other_mean_row(backend, wrong: Tensor) -> None:
    zero = torch.zeros(6, 4)
    with pytest.raises(RuntimeError, match=r"do not fit|need float32 vectors"):
        backend.check(one_step.job((zero, zero, zero, torch.ones(1, 4)), center=True), torch.ones(1, 4), wrong)


# -------------------------------------------------------------------------------------------------------- param_groups


class Tied(nn.Module):
    def __init__(self, tied: bool, cap: float | None = None) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.config = SimpleNamespace(final_logit_softcapping=cap)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_param_groups_center_the_output_embedding_alone() -> None:
    model = Tied(tied=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = param_groups(model, center=True)
    assert [group.get("center", False) for group in groups] == [True, False]
    assert groups[0]["params"][0][1] is model.head.weight
    assert not any("center" in group for group in param_groups(model))
    optimizer = CoupledAdam(groups)
    assert "centered in every step: head.weight" in describe(optimizer)
    assert "centered" not in describe(CoupledAdam(param_groups(model)))
    with pytest.raises(ValueError, match="centers this matrix in every step"):
        drift(optimizer, model.head.weight)


def test_param_groups_warn_where_the_mean_tells() -> None:
    with pytest.warns(UserWarning, match="also shifts the input embeddings.*Untie them"):
        param_groups(Tied(tied=True), center=True)
    with pytest.warns(UserWarning, match="caps its logits .at 30.*Leave out one of the two"):
        param_groups(Tied(tied=False, cap=30.0), center=True)
    by_words = Tied(tied=False)
    by_words.get_output_embeddings = lambda: by_words.embedding
    with pytest.warns(UserWarning, match="also shifts the input embeddings"):
        param_groups(by_words, coupled="embedding", center=True)
    with pytest.warns(UserWarning, match="shifts embedding.weight, the weight of an embedding: if the model reads"):
        param_groups(Tied(tied=False), coupled=["embedding", "head"], center=True)
    with pytest.warns(UserWarning, match="shifts item.weight.*They do not if rows are only scored"):
        param_groups(nn.ModuleDict({"item": nn.Embedding(9, 4)}), coupled="item", center=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        param_groups(Tied(tied=True, cap=30.0))


# ------------------------------------------------------------------------------------------------------ real processes


@pytest.mark.long
@pytest.mark.parametrize(
    ("layout", "vocabulary", "sent"),
    [(("rows",), 7, 1), (("rows",), 2, 1), (("columns",), 7, 1), (("whole",), 7, 0)],
    ids=str,
)
def test_processes_together_do_what_one_does_and_send_no_more(processes, layout, vocabulary, sent) -> None:
    expected = jobs.centered_steps("clipped", vocabulary)
    for found in processes(3).run(jobs.centered_steps, "clipped", vocabulary, layout):
        assert found["sent"] == [{"allreduce_": sent} if sent else {}] * jobs.STEPS
        assert found["passes"] == (1 if found["rows"] else jobs.STEPS), "sums are kept where there is something to sum"
        torch.testing.assert_close(found["param"], expected["param"], rtol=1e-5, atol=1e-6)
        assert found["means"] < 1e-6


@pytest.mark.long
@pytest.mark.parametrize(
    ("count", "wrapping", "optimizer"), [(3, "fsdp", "clipped"), (4, "hsdp", "clipped"), (2, "zero", "clipped adams")]
)
def test_a_wrapped_language_model_is_centered_as_in_one_process(processes, count, wrapping, optimizer) -> None:
    expected = jobs.centered_training(optimizer)
    (name,) = (name for name, x in expected.items() if x.shape == (jobs.VOCABULARY, jobs.WIDTH))
    assert expected[name].mean(0).abs().max() < 1e-7
    for found in processes(count).run(jobs.centered_training, optimizer, wrapping):
        assert found["passes"] == expected["passes"] == (0 if "adams" in optimizer else 1)
        for key, x in expected.items():
            torch.testing.assert_close(found[key], x, rtol=1e-6, atol=1e-6, msg=lambda m, n=key: f"{n}: {m}")


@pytest.mark.long
def test_what_is_not_foreseen_takes_one_more_all_reduce(processes) -> None:
    for kind, coupled in (("clipped adams", True), ("clipped", False)):
        expected = jobs.centered_steps(kind, 7, coupled=coupled)
        for found in processes(3).run(jobs.centered_steps, kind, 7, ("rows",), coupled=coupled):
            assert found["sent"] == [{"allreduce_": 2}] * jobs.STEPS
            torch.testing.assert_close(found["param"], expected["param"], rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_center_is_of_all_rows_wherever_they_lie(processes) -> None:
    for found in processes(3).run(jobs.centered_by_hand, [4, 0, 3]):
        for x in found:
            torch.testing.assert_close(x, jobs.centered_by_hand([7], alone=True)[0], rtol=0, atol=1e-6)


@pytest.mark.long
def test_vocabulary_shards_that_are_plain_tensors(processes) -> None:
    alone = jobs.centered_shards([7], alone=True)
    found = torch.cat(processes(3).run(jobs.centered_shards, [5, 0, 2]))
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)
