"""The table over runs: its columns, its means, its tests."""

import csv
import dataclasses
import io
import json
import statistics
from pathlib import Path

import pytest
from made_up import diverge, write_run, write_suite
from scipy import stats
from typer.testing import CliRunner

from coupled_adam.cli import app
from coupled_adam.errors import InputError
from coupled_adam.figures import FIGURES, figures
from coupled_adam.report import aggregate
from coupled_adam.report.report_page import comparison_lines, published_lines

DOWNSTREAM = {
    "acc": 0.4,
    "acc_stderr": 0.01,
    "complete": True,
    "settings": {"model_digest": "w", "limit": None},
    "tasks": {},
}


def test_the_columns_are_those_of_the_reference_in_its_order(tmp_path: Path) -> None:
    run = write_run(tmp_path, "exp", figures={"smallest_singular_value": 1.0, "inverse_condition": 12.5})
    (run / "evaluation" / "downstream.json").write_text(json.dumps(DOWNSTREAM))
    header, row = csv.reader(io.StringIO(aggregate.as_csv(aggregate.read_runs([tmp_path]))))
    assert header == [
        "name", "test_loss (~)", "test_loss", "test_perplexity", "lm-eval-avg-acc", "lm-eval-avg-acc-std", "isotropy",
        "avg norm", "mu norm", "ratio norm", "eb_cos_sim", "eb_dot_sim", "corr_p(norm, lbp)", "corr_s(norm, lbp)",
        "corr_p(Emu, lbp)", "corr_s(Emu, lbp)", "Smin", "Smax", "Smin/Smax",
        # and then those of ours
        "family", "experiment", "seed", "model", "parameters", "tied", "tokens", "steps", "batch_tokens",
        "vocab_size", "corpus", "method", "core", "head", "lr", "lr_factor", "beta2", "initial_loss", "loss_selection",
        "loss_report", "bits_per_byte", *(f"loss_decile_{i}" for i in range(1, 11)), "kappa_rows", "kappa_text",
        "log_ratio_below_0.1", "log_ratio_0.1_to_1", "log_ratio_1_to_10", "log_ratio_above_10", "step_rms",
        "word_similarity_bare", "word_similarity_centered", "word_similarity_post_processed",
        "second_moment_frequency_fit", "drift_second_moments", "drift_gradients", "drift_decay", "diverged",
        "logit_mean", "logit_std", "logit_max", "log_z_squared", "version", "longer_from",
    ]  # fmt: skip
    found = dict(zip(header, row, strict=True))
    assert found["name"] == "exp-s1"
    assert float(found["test_loss (~)"]) == pytest.approx(6 + 8 / 9) and float(found["test_loss"]) == 6
    assert (found["lm-eval-avg-acc"], found["lm-eval-avg-acc-std"], found["isotropy"]) == ("0.4", "0.01", "0.5")
    assert (found["Smin"], found["Smax"], found["Smin/Smax"]) == ("1.0", "", "12.5")


def test_figures_by_frequency_and_the_step_in_the_middle(tmp_path: Path) -> None:
    run = write_run(tmp_path, "exp")
    shares = {"below_0.1": 0.5, "0.1_to_1": 0.2, "1_to_10": 0.15, "above_10": 0.1, "unseen": 0.05, "padding": 0.0}
    kappa = {
        name: {"rows": s, "text": s / 2, "held_out": 0.0, "predicted": 0.0, "log_ratio": s - 0.2}
        for name, s in shares.items()
    }
    found = {"loss_selection": 6.0, "loss_report": 6.5, "loss_by_decile": [float(i) for i in range(10)]}
    content = {"inputs": {"weights": "w"}, "step": 8, **found, "kappa": kappa}
    (run / "evaluation" / "frequency.json").write_text(json.dumps(content))

    def row() -> dict[str, str]:
        return next(csv.DictReader(io.StringIO(aggregate.as_csv(aggregate.read_runs([tmp_path])))))

    assert (row()["loss_decile_1"], row()["loss_decile_10"], row()["beta2"]) == ("0.0", "9.0", "0.95")
    assert float(row()["kappa_rows"]) == pytest.approx(0.3) and float(row()["kappa_text"]) == pytest.approx(0.15)
    assert float(row()["log_ratio_1_to_10"]) == pytest.approx(-0.05)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for steps, told in ((("6", "8"), ""), (("2", "4", "8"), "0.004")):
        kept = [
            line | ({"embedding_step_rms": line["step"] / 1000} if str(line["step"]) in steps else {}) for line in lines
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
        assert row()["step_rms"] == told, "that of step 4 of 8, or none"


def test_the_columns_say_what_a_run_was(tmp_path: Path) -> None:
    values = {"loss__z_loss": 1e-4, "model__tied": False, "model__logits": "bfloat16", "schedule__lr": 3e-2}
    logits = {"logit_mean": -9.5, "logit_std": 3.0, "logit_max": 40.0, "log_z_squared": 81.0}
    run = write_run(tmp_path, "mini-drift-z-loss-3e-2", 2, 5.5, logits, **values)
    (run / "environment.json").write_text(json.dumps({"corpus": "c", "packages": {"coupled-adam": "1.2.3"}}))
    (found,) = csv.DictReader(io.StringIO(aggregate.as_csv(aggregate.read_runs([tmp_path]))))
    expected = {
        "family": "drift", "experiment": "mini-drift-z-loss-3e-2", "seed": "2", "model": "gpt2", "tied": "false",
        "tokens": "512", "method": "AdamW + z-loss", "core": "adamw", "head": "bfloat16", "lr": "0.03",
        "lr_factor": "1.0", "loss_selection": "",
        "diverged": "false", "initial_loss": "13.5", "logit_mean": "-9.5", "logit_std": "3.0", "logit_max": "40.0",
        "log_z_squared": "81.0", "version": "1.2.3",
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    diverge(run)
    (found,) = csv.DictReader(io.StringIO(aggregate.as_csv(aggregate.read_runs([tmp_path]))))
    assert (found["diverged"], found["test_loss"], found["initial_loss"]) == ("true", "", "13.5")


def test_seeds_are_put_together_and_compared(tmp_path: Path) -> None:
    losses = {"A": [6.0, 6.2, 6.1], "V": [5.8, 5.9, 6.1]}
    for method, values in losses.items():
        name = "adamw" if method == "A" else "coupled_adam"
        for seed, loss in enumerate(values, start=1):
            write_run(tmp_path, method, seed, loss, optimizer__embedding__name=name)
    (pair,) = aggregate.comparisons(aggregate.groups(aggregate.read_runs([tmp_path])))
    found = pair.coupled.moments("validation_loss")
    assert (found.count, found.mean) == (3, pytest.approx(statistics.fmean(losses["V"])))
    assert found.deviation == pytest.approx(statistics.stdev(losses["V"]))
    difference = pair.difference("validation_loss")
    assert (difference.count, difference.mean) == (3, pytest.approx(-0.5 / 3))
    assert difference.p_value == pytest.approx(stats.ttest_rel(losses["V"], losses["A"]).pvalue)
    assert pair.difference("isotropy").p_value is None, "no spread at all"
    assert pair.difference("downstream_accuracy") is None
    # The paper's test, by hand: t = (v̄ − ā) / (s·√(2/3)) with the pooled variance s², and 4 degrees of freedom.
    pooled = (statistics.variance(losses["A"]) + statistics.variance(losses["V"])) / 2
    t = (statistics.fmean(losses["V"]) - statistics.fmean(losses["A"])) / (pooled * 2 / 3) ** 0.5
    assert pair.papers_p_value(FIGURES["validation_loss"]) == pytest.approx(stats.t.cdf(t, 4))
    higher = dataclasses.replace(FIGURES["validation_loss"], better="higher")
    assert pair.papers_p_value(higher) == pytest.approx(1 - stats.t.cdf(t, 4))
    assert pair.papers_p_value(FIGURES["isotropy"]) is None
    assert pair.papers_p_value(FIGURES["downstream_accuracy"]) is None


def test_runs_of_one_seed_are_pairs_and_the_others_are_left_out(tmp_path: Path) -> None:
    for method, seeds in (("A", (1, 2, 3)), ("V", (2, 3, 4))):
        name = "adamw" if method == "A" else "coupled_adam"
        for seed in seeds:
            write_run(tmp_path, method, seed, 6.0 + 10 * seed - (method == "V"), optimizer__embedding__name=name)
    (pair,) = aggregate.comparisons(aggregate.groups(aggregate.read_runs([tmp_path])))
    difference = pair.difference("validation_loss")
    assert (difference.count, difference.mean) == (2, -1.0)


def test_the_lines_are_in_the_layout_of_the_paper(tmp_path: Path) -> None:
    write_suite(tmp_path)
    pairs = aggregate.comparisons(aggregate.groups(aggregate.read_runs([tmp_path])))
    lines = comparison_lines(pairs, figures(("validation_loss", "mean_shift_ratio")))
    assert [(line.tokens, line.method) for line in lines] == [
        (tokens, method)
        for _ in range(2)
        for tokens in ("512", "1,024")
        for method in ("AdamW", "Coupled Adam", "difference")
    ]
    assert [line.runs for line in lines[:3]] == ["2", "2", "2 pairs"]
    assert [cell.text for cell in lines[0].cells] == ["6.115 ± 0.007", "0.715 ± 0.007"]
    # The losses differ by 0.1 in both pairs: there is nothing to test.
    shifts = [0.021 - 0.71, 0.022 - 0.72]
    p = min(1, 4 * stats.ttest_1samp(shifts, 0).pvalue)
    low, high = stats.t.interval(0.95, 1, statistics.fmean(shifts), stats.sem(shifts))
    assert [cell.text for cell in lines[2].cells] == [
        "-0.100 [-0.100, -0.100]",
        f"{statistics.fmean(shifts):+.3f} [{low:+.3f}, {high:+.3f}], p {p:.3f}",
    ]
    assert not any(cell.significant for line in lines for cell in line.cells), "the paper's test is for its own runs"
    assert [cell.text for cell in published_lines(figures(("validation_loss", "mean_shift_ratio")))[0].cells] == [
        "3.03",
        "0.82",
    ]


def test_the_papers_own_test_stands_beside_its_own_experiments(tmp_path: Path) -> None:
    for name, method, loss in (("exp12A", "adamw", 6.1), ("exp12V", "coupled_adam", 6.0)):
        for seed in (1, 2):
            write_run(tmp_path, name, seed, loss + 0.01 * seed, optimizer__embedding__name=method)
    pairs = aggregate.comparisons(aggregate.groups(aggregate.read_runs([tmp_path])))
    assert [pair.of_the_paper for pair in pairs] == [True]
    lines = comparison_lines(pairs, figures(("validation_loss",)))
    assert [line.cells[0].significant for line in lines] == [False, True, False]


def test_sweeps_are_in_order_with_the_plain_optimizer_among_them(tmp_path: Path) -> None:
    write_suite(tmp_path)
    centered = {"optimizer__embedding__name": "coupled_adam", "optimizer__embedding__center": True}
    write_run(tmp_path, "centered", 1, **centered)
    found = aggregate.groups(aggregate.read_runs([tmp_path]))
    (line,) = aggregate.sweep(found, "coupling_scale")
    assert [g.first.experiment.optimizer.embedding.coupling_scale for g in line] == [0.5, 1.0, 2.0]
    assert line[0].first.method == "Coupled Adam s=0.5"
    (line,) = aggregate.sweep(found, "lr_factor")
    assert [g.first.method for g in line] == ["SGD lr×100", "SGD lr×200"]


@pytest.mark.parametrize(
    "difference",
    [
        {"complete": False},
        {"settings": {"model_digest": "w", "limit": 5}},
        {"settings": {"model_digest": "old", "limit": None}},
    ],
)
def test_an_accuracy_that_is_not_the_papers_is_none(difference: dict, tmp_path: Path) -> None:
    run = write_run(tmp_path, "exp")
    (run / "evaluation" / "downstream.json").write_text(json.dumps(DOWNSTREAM | difference))
    (found,) = aggregate.read_runs([tmp_path])
    assert found.figures["downstream_accuracy"] is None and found.figures["validation_loss"] == 6


def test_figures_of_a_run_on_its_way_are_not_counted(tmp_path: Path) -> None:
    for seed in (1, 2):
        run = write_run(tmp_path, "exp", seed)
    path = run / "evaluation" / "validation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 2, "loss": 9.0}))
    (group,) = aggregate.groups(aggregate.read_runs([tmp_path]))
    assert (group.moments("validation_loss").count, group.moments("validation_loss").mean) == (1, 6.0)


def test_runs_are_grouped_by_all_that_changes_the_result(tmp_path: Path) -> None:
    write_run(tmp_path, "a", 1, train__compile=True, evaluation__every=2)
    write_run(tmp_path, "a", 2, train__micro_batch=1)
    for momentum in (0.5, 0.9):
        values = {"optimizer__embedding__name": "sgd", "optimizer__embedding__momentum": momentum}
        write_run(tmp_path, f"sgd-{momentum}", 1, **values)
    found = aggregate.groups(aggregate.read_runs([tmp_path]))
    assert {g.first.method: len(g.runs) for g in found} == {"AdamW": 2, "SGD momentum 0.5": 1, "SGD": 1}
    write_run(tmp_path / "again", "a", 1)
    with pytest.raises(InputError, match="are the same experiment with the same seed; pass only one"):
        aggregate.groups(aggregate.read_runs([tmp_path, tmp_path / "again"]))


def test_a_damaged_line_of_the_metrics_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, "exp")
    (run / "metrics.jsonl").write_text('{"step": 0}\n{"step"\n')
    with pytest.raises(InputError, match=r"metrics.jsonl: line 2: damaged"):
        aggregate.read_runs([tmp_path])


def test_what_cannot_be_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="contains no runs"):
        aggregate.read_runs([tmp_path])
    run = write_run(tmp_path, "exp")
    for file in (run / "evaluation").iterdir():
        file.unlink()
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "none of its 1 runs has been evaluated" in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("number", "text"), [(614_400, "0.614M"), (512, "512"), (124e6, "124M"), (1.31e9, "1.31B"), (98_304_000, "98.3M")]
)
def test_short_numbers(number: int, text: str) -> None:
    assert aggregate.short(int(number)) == text
