"""What centering an output embedding does to a run: nothing, where only differences of logits count."""

import pytest
import torch

from coupled_adam.lm.config import Experiment
from coupled_adam.lm.model import LanguageModel, build_model
from coupled_adam.lm.optimizers import build_optimizers
from coupled_adam.lm.schedule import learning_rate

VOCABULARY, LENGTH, STEPS = 64, 8, 50


def untied(**settings) -> Experiment:
    """Steps large enough that an uncentered mean moves far, and gradients that are clipped."""
    return Experiment.from_dict(
        {
            "run": {"name": "small"},
            "model": {"n_layers": 2, "n_heads": 2, "hidden_size": 16, "tied": False},
            "schedule": {"lr": 0.03, "min_lr": 1e-3, "warmup_steps": 5},
            "train": {"steps": STEPS, "max_grad_norm": 0.1},
        }
    ).with_values(**settings)


def trained(experiment: Experiment) -> tuple[list[float], LanguageModel, float]:
    """Losses, the model and the shortest gradient of a run in float64, on tokens of very different frequency."""
    model = build_model(experiment.model, VOCABULARY, LENGTH, seed=0, loss=experiment.loss).double()
    optimizers = build_optimizers(model, experiment)
    seeded, frequencies = torch.Generator().manual_seed(0), 1.0 / torch.arange(1, VOCABULARY + 1)
    losses, norms = [], []
    for step in range(STEPS):
        tokens = torch.multinomial(frequencies, 4 * (LENGTH + 1), replacement=True, generator=seeded).view(4, -1)
        optimizers.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:]).total / (4 * LENGTH)
        loss.backward()
        norms.append(optimizers.step(learning_rate(step, experiment.schedule, STEPS)).item())
        losses.append(loss.item())
    return losses, model, min(norms)


@pytest.mark.parametrize("embedding", ["adamw", "coupled_adam", "sgd"])
def test_an_untied_head_gives_the_same_run_but_for_its_mean(embedding: str) -> None:
    """p and every gradient depend on differences of rows alone, since Σ(p − onehot) = 0; so do Adam's moments."""
    settings = {"optimizer__embedding__name": embedding, "optimizer__embedding__lr_factor": 1.0}
    expected, plain, shortest = trained(untied(**settings))
    losses, centered, _ = trained(untied(**settings, optimizer__embedding__center=True))
    assert losses == pytest.approx(expected, rel=0, abs=1e-12)
    assert expected[-1] < expected[0] - 0.3 and shortest > 0.1, "it learns, and every step is clipped"
    for (name, found), weight in zip(centered.named_parameters(), plain.parameters(), strict=True):
        assert found.dtype == torch.float64
        shift = weight.mean(0) if name == "head.weight" else 0.0
        torch.testing.assert_close(found, weight - shift, rtol=0, atol=1e-11)
    mean = plain.head.weight.mean(0).norm().item()
    assert mean > (0.3 if embedding == "adamw" else 1e-3), "there was something to center"
    assert centered.head.weight.mean(0).norm() < 1e-15


@pytest.mark.parametrize(
    "settings",
    [
        {"model__tied": True},
        {"model__logits": "bfloat16"},
        {"loss__softcap": 30.0},
        {"loss__z_loss": 1e-4},
        {"loss__mu_loss": 1e-4},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_where_more_counts_than_differences_of_logits_it_is_another_run(settings: dict) -> None:
    """Each of the assumptions above is needed."""
    settings = {"optimizer__embedding__name": "adamw", **settings}
    expected, *_ = trained(untied(**settings))
    losses, *_ = trained(untied(**settings, optimizer__embedding__center=True))
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) > 1e-7
