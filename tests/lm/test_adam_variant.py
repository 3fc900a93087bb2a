"""The arms of the study of second moments: each against an optimizer that has it, or an equation."""

import math

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from coupled_adam import CoupledAdam
from coupled_adam.errors import InputError
from coupled_adam.lm.adam_variant import AdamVariant
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.model import build_model
from coupled_adam.lm.optimizers import build_optimizers

V, H, STEPS = 13, 5, 25


def gradients(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Rows of very different lengths, as those of rare and frequent tokens."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.logspace(-3, 1, V, dtype=dtype).unsqueeze(1)
    return [torch.randn(V, H, generator=generator, dtype=dtype) * scale for _ in range(STEPS)]


def trained(make, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    param = nn.Parameter(torch.linspace(-1, 1, V * H, dtype=dtype).reshape(V, H))
    optimizer = make(param)
    for grad in gradients(dtype):
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        param.grad = grad
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_one_second_moment_per_element_is_adam(amsgrad: bool) -> None:
    ours = trained(lambda p: AdamVariant([p], "element", (0.9, 0.95), amsgrad=amsgrad))
    torch.testing.assert_close(
        ours, trained(lambda p: AdamW([p], betas=(0.9, 0.95), weight_decay=0, amsgrad=amsgrad)), rtol=0, atol=1e-14
    )


def test_one_per_hidden_unit_is_coupled_adam() -> None:
    coupled = trained(
        lambda p: CoupledAdam([{"params": [p], "second_moment": "vocabulary"}], betas=(0.9, 0.95), weight_decay=0)
    )
    torch.testing.assert_close(trained(lambda p: AdamVariant([p], "hidden")), coupled, rtol=0, atol=1e-14)
    frequency = torch.linspace(0.1, 0.9, V, dtype=torch.float64)
    without = trained(lambda p: AdamVariant([p], "frequency", frequency=frequency, exponent=0.0))
    torch.testing.assert_close(without, coupled, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("shape", "averaged"), [("token", (1,)), ("scalar", (0, 1)), ("frequency", (0,)), ("factored", (0,))]
)
@pytest.mark.parametrize("zero_sum", [False, True])
def test_the_step_is_the_equation(shape, averaged, zero_sum: bool) -> None:
    frequency = torch.linspace(0.1, 0.9, V, dtype=torch.float64) if shape == "frequency" else None
    found = trained(lambda p: AdamVariant([p], shape, frequency=frequency, exponent=0.5, zero_sum=zero_sum))
    theta = torch.linspace(-1, 1, V * H, dtype=torch.float64).reshape(V, H)
    m, v, r = torch.zeros(V, H, dtype=torch.float64), 0.0, 0.0
    for t, g in enumerate(gradients(), start=1):
        m = 0.9 * m + 0.1 * g
        v = 0.95 * v + 0.05 * (g * g).mean(averaged, keepdim=True)
        r = 0.95 * r + 0.05 * (g * g).mean(1, keepdim=True)
        n = v if frequency is None else v * (frequency / frequency.mean()).sqrt()[:, None]
        n = n * (r / r.mean()).sqrt() if shape == "factored" else n
        u = m / (1 - 0.9**t) / ((n / (1 - 0.95**t)).sqrt() + 1e-8)
        theta = theta - 0.01 * (u - u.mean(0) if zero_sum else u)
    torch.testing.assert_close(found, theta, rtol=0, atol=1e-13)


def test_factored_with_the_exponent_1_is_adafactors_second_moment() -> None:
    """One step with β1 = 0 compares the two: torch's Adafactor has no first moment and no bias correction of Adam's."""
    param = nn.Parameter(torch.zeros(V, H, dtype=torch.float64))
    theirs = nn.Parameter(param.detach().clone())
    param.grad = theirs.grad = gradients()[0]
    ours = AdamVariant([param], "factored", (0.0, 0.95), eps=0.0, exponent=1.0)
    ours.param_groups[0]["lr"] = 1.0
    ours.step()
    torch.optim.Adafactor([theirs], lr=1.0, eps=(None, 1.0), weight_decay=0.0, d=1e9).step()
    ratio = param.detach() / theirs.detach()  # its learning rate is relative to the parameter
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))


@pytest.mark.parametrize("shape", ["element", "token", "hidden", "scalar"])
def test_a_zero_sum_leaves_the_mean_row_where_it_was(shape) -> None:
    moved = trained(lambda p: AdamVariant([p], shape, zero_sum=True))
    start = torch.linspace(-1, 1, V * H, dtype=torch.float64).reshape(V, H)
    assert (moved - start).abs().max() > 0.05
    torch.testing.assert_close(moved.mean(0), start.mean(0), rtol=0, atol=1e-15)


def test_frequency_and_its_exponent_go_together() -> None:
    with pytest.raises(ValueError, match="go together"):
        AdamVariant([nn.Parameter(torch.zeros(V, H))], "frequency")
    with pytest.raises(ValueError, match="go together"):
        AdamVariant([nn.Parameter(torch.zeros(V, H))], "token", frequency=torch.ones(V))


def test_an_experiment_builds_it(tiny: Experiment) -> None:
    experiment = tiny.with_values(
        optimizer__embedding__name="adam_variant",
        optimizer__embedding__second_moment="frequency",
        optimizer__embedding__frequency_exponent=0.5,
        optimizer__embedding__beta2=0.999,
        optimizer__embedding__lr_factor=3.0,
    )
    assert experiment.method == "Adam variant lr×3 v ~ frequency^0.5 β2=0.999"
    model = build_model(experiment.model, 320, 16, seed=0)
    with pytest.raises(InputError, match="token counts of a corpus"):
        build_optimizers(model, experiment)
    counts = torch.arange(320).numpy()
    first = build_optimizers(model, experiment, counts).all[0]
    assert isinstance(first, AdamVariant) and first.param_groups[0]["betas"] == (0.9, 0.999)
    assert first.param_groups[0]["params"] == [model.head.weight]
    share = (torch.arange(320) + 1) / (torch.arange(320) + 1).sum()
    torch.testing.assert_close(first.tempered.squeeze(1), (share * 320).sqrt())
    assert math.isclose(float(first.tempered[0]) ** 2, 320 / (320 * 321 / 2), rel_tol=1e-5)
