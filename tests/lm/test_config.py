"""The schema of an experiment file."""

import pytest

from coupled_adam import experiments
from coupled_adam.errors import InputError
from coupled_adam.lm.config import Experiment


def test_the_resolved_file_is_the_same_experiment(tiny: Experiment) -> None:
    assert Experiment.from_toml(tiny.to_toml()) == tiny
    assert Experiment.from_toml(tiny.to_toml()).differences(tiny) == []


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[run]\nname = 'x'\n[train]\nstep = 3", "train.step: unknown key; the nearest valid one is 'steps'"),
        ("[run]\nname = 'x'\n[optimizer.embeding]", "optimizer.embeding: unknown key; .*'embedding'"),
        ("[run]\nname = 'x'\n[optimizer.core]\nbeta = 1", "optimizer.core.beta: unknown key; .*'betas'"),
        ("[run]\nname = 'x'\n[train]\nsteps = '3'", "train.steps: .*integer.*'3'"),
        ("[run]\nname = 'x'\n[train]\nsteps = 0", "train.steps: .*greater than 0.*got 0"),
        (
            "[run]\nname = 'x'\n[optimizer.embedding]\nname = 'adam'",
            "optimizer.embedding.name: .*'adamw', 'coupled_adam', 'adams' or 'sgd'",
        ),
        ("[run]\nname = 'x'\n[model]\nn_heads = 3", "hidden_size 128 is not a multiple of n_heads 3"),
        ("[run]\nname = 'x'\n[schedule]\nlr = 1e-5", "min_lr 0.0001 is above lr 1e-05"),
        (
            "[run]\nname = 'x'\n[train]\nbatch_tokens = 100",
            "batch_tokens 100 is not a multiple of data.sequence_length 128",
        ),
        (
            "[run]\nname = 'x'\n[tracking]\ntrackers = ['wandb', 'csv']",
            "tracking.trackers.1: .*'tensorboard', 'wandb' or 'trackio' .*'csv'",
        ),
        ("[model]\nlayers = 2", "run: .*required"),
        ("run name", "not TOML"),
    ],
)
def test_mistakes_name_the_file_the_key_and_the_remedy(toml: str, message: str) -> None:
    with pytest.raises(InputError, match=f"(?s)my.toml: .*{message}"):
        Experiment.from_toml(toml, "my.toml")


def test_the_demo_is_what_its_documentation_says() -> None:
    demo = experiments.load("demo")
    assert (demo.model.n_layers, demo.model.n_heads, demo.model.hidden_size) == (4, 4, 128)
    assert (demo.data.sequence_length, demo.train.batch_tokens, demo.schedule.lr) == (128, 2048, 1e-3)


def test_published_results() -> None:
    assert len(experiments.published()) == 10
    row = experiments.published_result("125M", "20B", "Coupled Adam")
    assert (row.loss, row.isotropy, row.mean_shift_ratio, row.word_similarity) == (2.97, 0.83, 0.03, 57)
    assert experiments.published_result("2.6B", "210B", "AdamW").downstream_accuracy == 0.425
