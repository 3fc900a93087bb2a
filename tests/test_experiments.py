"""The experiments of the paper, as data."""

import itertools
import json
import re

import pytest
from typer.testing import CliRunner

from coupled_adam import experiments
from coupled_adam.cli import app
from coupled_adam.errors import InputError
from coupled_adam.experiments.grids import expand, matching
from coupled_adam.lm.estimate import estimate


def test_the_names_are_those_of_the_paper() -> None:
    small = set(experiments.names("small"))
    grid = {f"exp{m}{d}{v}" for m in "123" for d in "235" for v in "AV"} | {"exp00A", "exp00V"}
    scaled = {f"exp15V-as{s}" for s in (3, 6, 13, 25, 50, 200, 400, 800, 1600, 3200)}
    assert small == grid | scaled | {f"exp15A-sgd-{f}00" for f in range(1, 7)}
    assert len(experiments.names("large")) == 4
    assert all(name.startswith("mini-") for name in experiments.names("mini"))


@pytest.mark.parametrize("name", [n for n in experiments.names() if not n.startswith("oec-")])  # those: below
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


def test_the_sweeps_of_output_embedding_centering_have_the_shape_of_the_paper() -> None:
    found = {name: experiments.load(name) for name in experiments.names("oec")}
    assert len(found) == 5 * 7 * 10
    sizes = {name.split("-")[1]: experiment for name, experiment in found.items() if "-baseline-" in name}
    for size, experiment in sizes.items():
        counts = estimate(experiment)
        one_matrix = counts.parameters - counts.embedding_parameters  # how the paper counts the two of them
        assert one_matrix == pytest.approx(1e6 * float(size.removesuffix("M")), abs=0.65e6)
        assert counts.tokens == 13_107_200_000
    assert sorted({e.schedule.lr for e in found.values()}) == experiments.published_learning_rates()
    penalties = {(e.loss.mu_loss, e.loss.z_loss, e.optimizer.embedding.center) for e in found.values()}
    strengths = [1e-7, 1e-4, 1e-1, 1e2]
    expected = {(0, 0, False), (0, 0, True)}
    assert penalties == expected | {(x, 0, False) for x in strengths} | {(0, x, False) for x in strengths}
    assert set(sizes) == {sweep.model for sweep in experiments.published_sweeps()}
    for e in found.values():
        assert (e.model.n_heads, e.model.tied, e.model.qk_norm, e.model.norm_name) == (4, False, True, "layernorm")
        core = e.optimizer.core
        assert (core.name, core.betas, core.eps, core.weight_decay) == ("adamw", (0.9, 0.95), 1e-8, 0)
        assert (e.schedule.warmup_steps, e.schedule.min_lr, e.train.max_grad_norm) == (5_000, 1e-5, 1)
        assert (e.train.precision, e.data.sequence_length, e.optimizer.embedding.name) == ("bfloat16", 2048, "adamw")


@pytest.mark.parametrize("name", experiments.names("small"))
def test_the_small_scale_is_set_up_as_the_authors_did(name: str) -> None:
    e = experiments.load(name)
    micro_batch, tenth = (6 if name.startswith("exp3") else 12), max(e.train.steps // 10, 1_000)
    assert (e.model.gelu, e.train.sampling, e.data.held_out) == ("exact", "replacement", 0.0005)
    assert e.train.precision == e.evaluation.precision == "bfloat16"
    assert e.train.micro_batch == micro_batch
    assert e.evaluation.final_batches * e.batch_size == 2_000 * micro_batch
    assert 0 <= e.evaluation.batches * e.batch_size - 100 * micro_batch < e.batch_size, "whole batches"
    assert e.evaluation.every == e.train.checkpoint_every == tenth
    assert e.train.batch_tokens == 98_304 and (e.data.sequence_length, e.schedule.warmup_steps) == (1024, 100)


@pytest.mark.parametrize("suite", ["mini", "oec", "large"])
def test_the_other_suites_are_as_before_there_was_a_choice(suite: str) -> None:
    for e in map(experiments.load, experiments.names(suite)):
        assert (e.model.gelu, e.train.sampling, e.data.held_out) == ("tanh", "permutation", None)
        assert e.evaluation.precision == "float32"


def test_scaled_and_sgd() -> None:
    settings = experiments.load("exp15V-as13").optimizer.embedding
    assert (settings.name, settings.coupling_scale) == ("coupled_adam", 0.125)
    settings = experiments.load("exp15A-sgd-400").optimizer.embedding
    assert (settings.name, settings.lr_factor, settings.momentum) == ("sgd", 400.0, 0.9)


# As in the authors' README: model, data and variant are digits and a letter, and then again in words.
SIZES, STEPS = {"1": "125M", "2": "355M", "3": "760M"}, {"2": "50k", "3": "100k", "5": "200k"}
VARIANTS = {"A": "baseline", "V": "AVG"}
AUTHORS = {
    **{
        f"exp{m}{d}{v}": f"exp{m}{d}{v}-node-{SIZES[m]}-{STEPS[d]}-{VARIANTS[v]}"
        for m in "123"
        for d in "235"
        for v in "AV"
    },
    **{f"exp00{v}": f"exp00{v}-node-125M-1k-{VARIANTS[v]}" for v in "AV"},
    **{f"exp15V-as{s}": f"exp15V-node-125M-200k-AVG-as{s}" for s in (3, 6, 13, 25, 50, 200, 400, 800, 1600, 3200)},
    **{f"exp15A-sgd-{f}00": f"exp15A-node-125M-200k-sgd-{f}00" for f in range(1, 7)},
}


def test_the_authors_names_are_understood() -> None:
    assert set(AUTHORS) == set(experiments.names("small")) and len(AUTHORS) == 36
    for ours, theirs in AUTHORS.items():
        assert experiments.authors_name(ours) == theirs
        for seed in (1, 2, 3):
            assert experiments.load(f"{theirs}-s{seed}") == experiments.load(ours, seed)
        assert experiments.load(theirs) == experiments.load(ours)
        assert experiments.load(theirs, seed=2) == experiments.load(f"{theirs}-s2", seed=2)


@pytest.mark.parametrize("name", ["exp15A-sgd-200", "llama-1.3B-26B-V", "mini-scaled-n-1", "oec-16M-baseline-3e-4"])
def test_the_name_of_a_run_is_that_of_its_experiment_and_its_seed(name: str) -> None:
    assert experiments.load(f"{name}-s12") == experiments.load(name, seed=12)
    assert experiments.load(name).run.name == f"{name}-s1"
    assert experiments.load("demo-s2") == experiments.load("demo", seed=2)


@pytest.mark.parametrize(
    ("name", "seed", "message"),
    [
        ("exp35B", None, "exp35B: no experiment of that name; the nearest is 'exp35"),
        ("exp35B-s1", None, "exp35B-s1: no experiment of that name; the nearest is 'exp35"),
        ("exp15V-node-125M-200k-AVG-as4-s1", None, "no experiment of that name; the nearest is 'exp15V-node-.*-AVG-as"),
        (
            "exp15V-node-355M-200k-AVG-s1",
            None,
            "no experiment of that name; the nearest is 'exp.5V-node-...M-200k-AVG'",
        ),
        ("exp15A-node-125M-200k-AVG-s1", None, "no experiment of that name; the nearest is 'exp15.-node-125M-200k"),
        (
            "exp15G-node-125M-200k-AVG-s1",
            None,
            "no experiment of that name; the nearest is 'exp15V-node-125M-200k-AVG'",
        ),
        ("exp15V-node", None, "no experiment of that name; the nearest is 'exp.*-node-"),
        ("exp15A-sgd-700", None, "no experiment of that name; the nearest is 'exp15A-sgd-.00'"),
        *(
            (f"{name}-s{seed}", None, f"-s{seed}: its seed, '{seed}', is not a whole number; write, for example, -s1")
            for name in ("exp15V-node-125M-200k-AVG-as3", "exp12A", "mini-S-300A")
            for seed in ("", "01", "1x", "1.5", "-1")
        ),
        ("exp12A-node-125M-50k-baseline-s1", 2, "its name has seed 1, but seed 2 was requested; leave one out"),
        ("exp12A-s3", 0, "its name has seed 3, but seed 0 was requested"),
    ],
)
def test_a_name_that_stands_for_nothing_is_answered(name: str, seed: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        experiments.load(name, seed)
    assert str(error.value).startswith(f"{name}: ")


def test_the_commands_take_the_authors_names() -> None:
    name = "exp15V-node-125M-200k-AVG-as3-s2"
    shown = CliRunner().invoke(app, ["experiments", name])
    assert (
        shown.exit_code == 0 and 'name = "exp15V-as3-s2"' in shown.output and "coupling_scale = 0.03125" in shown.output
    )
    both = CliRunner().invoke(app, ["experiments", name, "--seed", "3"])
    assert both.exit_code != 0 and "leave one out" in str(both.exception)
    refused = CliRunner().invoke(app, ["train", name])
    assert refused.exit_code != 0 and "exp15V-as3-s2 trains on Skylion007/openwebtext" in str(refused.exception)


def test_the_families_name_experiments_that_exist() -> None:
    families = experiments.families()
    assert set(families) == {
        *("small", "scaled", "sgd", "llama", "long", "drift", "precision", "tied", "core"),
        *(
            "noise",
            "what-tied",
            "what-untied",
            "one-rate",
            "health",
            "batch",
            "large-batch",
            "steps",
            "rest",
            "rates",
            "words",
            "warm",
            "muon",
            "masked",
            "decay",
        ),
    }
    assert families["small"]["seeds"] == [1, 2, 3]
    named = {name for family in families.values() for name in family["experiments"]}
    assert named == set(experiments.names("mini"))


def test_a_sweep_takes_all_methods_at_one_rate_before_the_next() -> None:
    rates = {"drift": 6, "precision": 6, "tied": 3, "core": 3}
    for family, count in rates.items():
        found = [experiments.load(name) for name in experiments.families()[family]["experiments"]]
        by_rate = [(rate, len(list(same))) for rate, same in itertools.groupby(e.schedule.lr for e in found)]
        assert len(by_rate) == len(dict(by_rate)) == count and len({number for _, number in by_rate}) == 1
        shared = {(e.train.steps, e.train.batch_tokens, e.optimizer.core.weight_decay, e.model.qk_norm) for e in found}
        assert shared == {(488, 1024, 0.0, True)}
        assert {e.model.tied for e in found} == {family == "tied"}


def test_muon_with_and_without_a_split_meets_every_optimizer_of_the_embedding() -> None:
    named, arms = experiments.families()["muon"]["experiments"], ("adamw", "coupled", "sgd")
    controls = {f"mini-what-untied-{arm}": set() for arm in arms}
    found = {f"mini-muon-fused-{arm}": {"run.name", "optimizer.core.name"} for arm in arms}
    found |= {f"mini-muon-split-{arm}": {"run.name", "optimizer.core.name", "model.qkv"} for arm in arms}
    assert {name.rpartition("-x")[0] for name in named} == {*controls, *found} and len(named) == 9 * 9
    for name, expected in (controls | found).items():
        control = experiments.load(f"mini-what-untied-{name.rpartition('-')[2]}-x10")
        assert {d.split(":")[0] for d in control.differences(experiments.load(f"{name}-x10"))} == expected


def test_adams_is_compared_where_it_takes_a_matrix_as_a_whole() -> None:
    found = [experiments.load(name) for name in experiments.families()["decay"]["experiments"]]
    combined = {(e.optimizer.core.name, e.model.qkv, e.optimizer.embedding.name) for e in found}
    matrices = [("adamw", "fused"), ("adams", "fused"), ("adams", "heads")]
    assert combined == {(*m, e) for m in matrices for e in ("adamw", "coupled_adam", "sgd")}
    assert {e.optimizer.core.weight_decay for e in found} == {0.1} and len(found) == 9 * 9


def test_no_two_experiments_of_a_suite_are_the_same_run() -> None:
    for suite in experiments.SUITES:
        contents = [experiments.load(n).model_dump(exclude={"run"}) for n in experiments.names(suite)]
        assert len({json.dumps(content, sort_keys=True) for content in contents}) == len(contents)


GRID = {"name": "g-{x}-{y}", "parts": ["base"], "axes": {"x": ["a", "b"], "y": ["c", ["a", "c"]]}}


def test_a_grid_is_the_product_of_its_axes_the_last_one_varying_fastest() -> None:
    grid = expand("suite", GRID, {"a", "b", "c", "base"})
    assert list(grid.experiments.items()) == [
        ("g-a-c", ["base", "a", "c"]),
        ("g-a-a-c", ["base", "a", "a", "c"]),
        ("g-b-c", ["base", "b", "c"]),
        ("g-b-a-c", ["base", "b", "a", "c"]),
    ]
    assert grid.axes == {"x": ("a", "b"), "y": ("c", "a-c")}
    assert matching("suite", ["g-b-*", "*-c"], list(grid.experiments)) == ["g-b-c", "g-b-a-c", "g-a-c", "g-a-a-c"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"axis": {}}, "axis is missing or unknown; a grid has name, axes and, optionally, parts"),
        ({"name": None}, "name is missing or unknown"),
        ({"name": "g-{x}"}, "name 'g-{x}' must hold every axis once, in braces: x, y"),
        ({"name": "g-{x}-{x}-{y}"}, "must hold every axis once"),
        ({"axes": {"x": ["a"], "y": []}}, "axis y has no entries"),
        ({"axes": {"x": ["a"], "y": ["d"]}}, "unknown part 'd'; choose from a, b, c, base"),
        ({"parts": ["bas"]}, "unknown part 'bas'"),
        ({"axes": {"x": ["a", "a"], "y": ["c"]}}, "two of its experiments would be called g-a-c"),
    ],
)
def test_a_wrong_grid_is_answered(changed: dict[str, object], message: str) -> None:
    table = {key: value for key, value in (GRID | changed).items() if value is not None}
    with pytest.raises(InputError, match=f"^suite: .*{re.escape(message)}"):
        expand("suite", table, ["a", "b", "c", "base"])


def test_a_pattern_that_matches_nothing_is_answered() -> None:
    with pytest.raises(InputError, match=r"^suite: no experiment is called h-\*$"):
        matching("suite", ["h-*"], ["g-a"])


def test_the_command_lists_and_shows() -> None:
    listed = CliRunner().invoke(app, ["experiments"])
    gridded = {name for grid in experiments.grids() for name in grid.experiments}
    alone = set(experiments.names()) - gridded
    assert listed.exit_code == 0 and all(name in listed.output for name in alone)
    assert all(grid.pattern in listed.output for grid in experiments.grids())
    assert len(listed.output.splitlines()) < len(alone) + 60, "a grid is summed up"
    shown = CliRunner().invoke(app, ["experiments", "exp35V", "--seed", "3", "--gpu", "A100"])
    assert "758,392,320" in shown.output and 'name = "exp35V-s3"' in shown.output and "A100" in shown.output
    found = json.loads(CliRunner().invoke(app, ["experiments", "exp35V", "--json"]).output)
    assert found["estimate"]["steps"] == 200_000
    of_a_grid = CliRunner().invoke(app, ["experiments", "mini-drift-mu-loss-3e-1"])
    assert "lr = 0.3" in of_a_grid.output and "mu_loss = 0.0001" in of_a_grid.output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps"], "write section.key=value"),
        (["train.step=3"], "train.step: unknown key; the nearest valid one is 'steps'"),
        (["train.steps=many"], "train.steps: .*integer.*'many'"),
        (["run.name.x=3"], "name is not a section"),
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
