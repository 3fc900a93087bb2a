"""The experiments of the paper, as data."""

import json

import pytest
from typer.testing import CliRunner

from coupled_adam import experiments
from coupled_adam.cli import app
from coupled_adam.errors import InputError
from coupled_adam.lm.estimate import estimate


def test_the_names_are_those_of_the_paper() -> None:
    small = set(experiments.names("small"))
    grid = {f"exp{m}{d}{v}" for m in "123" for d in "235" for v in "AV"} | {"exp00A", "exp00V"}
    scaled = {f"exp15V-as{s}" for s in (3, 6, 13, 25, 50, 200, 400, 800, 1600, 3200)}
    assert small == grid | scaled | {f"exp15A-sgd-{f}00" for f in range(1, 7)}
    assert len(experiments.names("large")) == 4
    assert all(name.startswith("mini-") for name in experiments.names("mini"))


@pytest.mark.parametrize("name", experiments.names())
def test_every_experiment_is_valid_and_its_pairs_differ_in_the_embedding_alone(name: str) -> None:
    experiment = experiments.load(name, seed=2)
    assert experiment.run.name == f"{name}-s2" and experiment.run.seed == 2
    if name.endswith("V"):
        difference = experiments.load(name[:-1] + "A", seed=2).differences(experiment)
        assert [d.split(":")[0] for d in difference] == ["run.name", "optimizer.embedding.name"]


@pytest.mark.parametrize(
    ("name", "parameters", "tokens", "rate"),
    [
        ("exp12A", 125e6, 5e9, 6e-4),
        ("exp23V", 355e6, 10e9, 3e-4),
        ("exp35V", 760e6, 20e9, 2.5e-4),
        ("llama-1.3B-26B-A", 1.3e9, 26e9, 2e-4),
        ("llama-2.6B-210B-V", 2.6e9, 210e9, 1.6e-4),
    ],
)
def test_the_counts_agree_with_the_names(name: str, parameters: float, tokens: float, rate: float) -> None:
    experiment = experiments.load(name)
    found = estimate(experiment)
    assert found.parameters == pytest.approx(parameters, rel=0.02)
    assert found.tokens == pytest.approx(tokens, rel=0.02)
    assert experiment.schedule.lr == rate
    assert found.flops == pytest.approx(6 * found.parameters * found.tokens, rel=0.65)  # attention, recomputation
    moments = 4 * (2 * found.parameters - (found.embedding_parameters if name.endswith("V") else 0))
    assert found.optimizer_bytes == moments


def test_scaled_and_sgd() -> None:
    settings = experiments.load("exp15V-as13").optimizer.embedding
    assert (settings.name, settings.coupling_scale) == ("coupled_adam", 0.125)
    settings = experiments.load("exp15A-sgd-400").optimizer.embedding
    assert (settings.name, settings.lr_factor, settings.momentum) == ("sgd", 400.0, 0.9)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="exp35B: no experiment of that name; the nearest is 'exp35"):
        experiments.load("exp35B")


def test_the_families_name_experiments_that_exist() -> None:
    families = experiments.families()
    assert set(families) == {"small", "scaled", "sgd", "llama", "long"}
    assert families["small"]["seeds"] == [1, 2, 3]
    named = {name for family in families.values() for name in family["experiments"]}
    assert named == set(experiments.names("mini"))


def test_the_command_lists_and_shows() -> None:
    listed = CliRunner().invoke(app, ["experiments"])
    assert listed.exit_code == 0 and all(name in listed.output for name in experiments.names())
    shown = CliRunner().invoke(app, ["experiments", "exp35V", "--seed", "3", "--gpu", "A100"])
    assert "758,392,320" in shown.output and 'name = "exp35V-s3"' in shown.output and "A100" in shown.output
    found = json.loads(CliRunner().invoke(app, ["experiments", "exp35V", "--json"]).output)
    assert found["estimate"]["steps"] == 200_000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps"], "write section.key=value"),
        (["train.step=3"], "train.step: unknown key; the nearest valid one is 'steps'"),
        (["train.steps=many"], "train.steps: .*integer.*'many'"),
        (["run.name.x=3"], "name is no section"),
    ],
)
def test_wrong_overrides_are_answered(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        experiments.load("mini-S-300A").overridden(overrides)


def test_overrides() -> None:
    changed = experiments.load("mini-S-300A").overridden(
        [
            "train.steps=7",
            "optimizer.embedding.name=coupled_adam",
            "optimizer.core.betas=[0.8, 0.9]",
            "schedule.lr=2e-3",
        ]
    )
    assert changed.train.steps == 7 and changed.optimizer.embedding.name == "coupled_adam"
    assert changed.optimizer.core.betas == (0.8, 0.9) and changed.schedule.lr == 2e-3
