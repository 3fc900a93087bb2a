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
            "optimizer.embedding.name: .*'adamw', 'coupled_adam', 'adams', 'sgd' or 'adam_variant'",
        ),
        ("[run]\nname = 'x'\n[model]\nn_heads = 3", "hidden_size 128 is not a multiple of n_heads 3"),
        (
            "[run]\nname = 'x'\n[model]\nmlp_multiple = 64",
            "mlp_multiple 64 applies only to the families llama and modernbert; .*leave it out",
        ),
        (
            "[run]\nname = 'x'\n[model]\nfamily = 'llama'\ngelu = 'exact'",
            "gelu 'exact' applies only to the family gpt2; the MLP of llama is SwiGLU: leave it out",
        ),
        (
            "[run]\nname = 'x'\n[model]\nfamily = 'modernbert'\ngelu = 'exact'",
            "gelu 'exact' applies only to the family gpt2; the MLP of modernbert is GeGLU .*: leave it out",
        ),
        (
            "[run]\nname = 'x'\n[train]\nmasked = 0.3",
            "train.masked 0.3 applies only to model.family 'modernbert'; gpt2 predicts .*: leave it out",
        ),
        (
            "[run]\nname = 'x'\n[model]\nfamily = 'modernbert'\n[train]\nmasked = 1e-3\n[data]\nvocab_size = 8191",
            "train.masked 0.001 of data.sequence_length 128 rounds to no token: raise one",
        ),
        (
            "[run]\nname = 'x'\n[model]\nfamily = 'modernbert'",
            "data.vocab_size 8192 is a multiple of 64, .*no row for the mask token: set it to 8191",
        ),
        (
            "[run]\nname = 'x'\n[model]\nqkv = 'heads'\n[optimizer.core]\nname = 'muon'",
            "model.qkv 'heads' works only with .* 'adams', .*Muon takes one matrix at a time: choose 'split'",
        ),
        (
            "[run]\nname = 'x'\n[optimizer.embedding]\nrow_exponent = 0.5",
            "row_exponent 0.5 applies only to .* 'coupled_adam' and 'adams', not to 'adamw': leave it out",
        ),
        ("[run]\nname = 'x'\n[data]\nheld_out = 0.6", "data.held_out: .*less than or equal to 0.5.*0.6"),
        ("[run]\nname = 'x'\n[train]\nsampling = 'random'", "train.sampling: .*'permutation' or 'replacement'"),
        ("[run]\nname = 'x'\n[model]\nlogits = 'float16'", "model.logits: .*'float32' or 'bfloat16'.*'float16'"),
        ("[run]\nname = 'x'\n[loss]\nz_loss = -1.0", "loss.z_loss: .*greater than or equal to 0.*-1.0"),
        ("[run]\nname = 'x'\n[loss]\nmu_loss = inf", "loss.mu_loss: .*finite.*inf"),
        ("[run]\nname = 'x'\n[loss]\nsoftcap = 0.0", "loss.softcap: .*greater than 0.*0.0"),
        ("[run]\nname = 'x'\n[loss]\nzloss = 1e-4", "loss.zloss: unknown key; .*'z_loss'"),
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


def test_a_file_from_before_there_were_penalties_is_the_same_experiment(tiny: Experiment) -> None:
    newer = ("[loss]\n", "z_loss = ", "mu_loss = ", "center = ", "qk_norm = ", "mlp_multiple = ")
    lines = tiny.to_toml().splitlines(keepends=True)
    older = "".join(line for line in lines if not line.startswith(newer))
    assert len(older.splitlines()) == len(lines) - len(newer)
    assert Experiment.from_toml(older) == tiny and Experiment.from_toml(older).differences(tiny) == []


@pytest.mark.parametrize("key", ["model.gelu", "model.qkv", "data.held_out", "train.sampling", "evaluation.precision"])
def test_a_file_from_before_a_setting_is_the_same_experiment(key: str, tiny: Experiment) -> None:
    tables = tiny.model_dump(exclude_none=True)
    section, name = key.split(".")
    tables[section].pop(name, None)
    assert Experiment.from_dict(tables) == tiny


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({}, "Coupled Adam"),
        ({"model__logits": "bfloat16", "model__qk_norm": True}, "Coupled Adam"),
        ({"optimizer__embedding__center": True}, "Coupled Adam + center"),
        (
            {
                "optimizer__embedding__name": "adamw",
                "optimizer__embedding__center": True,
                "loss__softcap": 30.0,
                "loss__z_loss": 1e-4,
                "loss__mu_loss": 1e-4,
            },
            "AdamW + center + μ-loss + z-loss + soft-cap",
        ),
        (
            {
                "optimizer__embedding__coupling_scale": 2.0,
                "loss__softcap": 15.0,
                "loss__z_loss": 0.1,
                "loss__mu_loss": 1e-7,
            },
            "Coupled Adam s=2 + μ-loss (1e-07) + z-loss (0.1) + soft-cap (15)",
        ),
    ],
)
def test_the_method_is_named(tiny: Experiment, settings: dict, method: str) -> None:
    assert tiny.with_values(**settings).method == method


def test_what_centering_changes_is_said(tiny: Experiment) -> None:
    centered = tiny.with_values(optimizer__embedding__center=True, loss__softcap=30.0)
    tied, capped = centered.caveats
    assert "the embeddings are tied" in tied and "model.tied = false" in tied
    assert "soft-capping is not invariant" in capped
    assert centered.with_values(model__tied=False, loss__softcap=None).caveats == []
    assert tiny.with_values(loss__softcap=30.0).caveats == []
