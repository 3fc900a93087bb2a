"""The stages after training: one file each, made once."""

import errno
import itertools
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_of_an_older_version, tiny_experiment
from paragraphs import paragraphs
from typer.testing import CliRunner

from coupled_adam import geometry
from coupled_adam.cli import app
from coupled_adam.errors import InputError
from coupled_adam.evaluation import stages
from coupled_adam.evaluation.during_training import evaluator
from coupled_adam.evaluation.results import read_results, write_results
from coupled_adam.evaluation.token_sample import TokenSample, sample_tokens
from coupled_adam.lm.metrics_jsonl import MetricsLog
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.run import open_run
from coupled_adam.lm.sources import TextFiles
from coupled_adam.lm.train import train

OFFLINE = ("validation", "embeddings", "export")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 24 steps with AdamW, in the directory of its corpus, of which the checkpoint of step 20 was kept."""
    directory = tmp_path_factory.mktemp("trained")
    (directory / "text.txt").write_text(paragraphs(200), encoding="utf-8")
    experiment = tiny_experiment().with_values(optimizer__embedding__name="adamw", train__keep_every=10)
    corpus = prepare(TextFiles(directory / "text.txt"), experiment.data, directory / "corpus")
    train(experiment, corpus, directory / "run", evaluator(experiment, corpus))
    return directory / "run"


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to do with as a test likes."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_the_stages_measure_what_training_measured_and_more(run_dir: Path) -> None:
    results = stages.evaluate(run_dir, only=OFFLINE)
    last = MetricsLog(run_dir / "metrics.jsonl").read()[-1]
    validation, figures = results["validation"], results["embeddings"]["figures"]
    assert validation["loss"] == pytest.approx(last["validation_loss"], rel=1e-6)
    assert validation["perplexity"] == pytest.approx(math.exp(validation["loss"]))
    assert validation["tokens"] == 2 * 64
    for name in ("logit_mean", "logit_std", "logit_max", "log_z_squared"):
        assert validation[name] == pytest.approx(last[name], rel=1e-6)
    for name in ("isotropy", "mean_shift_ratio", "inverse_condition", "norm_frequency_spearman"):
        assert figures[name] == pytest.approx(last[name], rel=1e-6)
    run = open_run(run_dir)
    fit = geometry.second_moment_frequency_fit(run.second_moment(), run.corpus.unigram_counts)
    assert figures["second_moment_frequency_fit"] == pytest.approx(fit)
    assert results["embeddings"] == stages.read_stage(run_dir, "embeddings")
    assert len(results["embeddings"]["singular_values"]) == 16
    assert list(results["embeddings"]["word_similarity"]) == [
        "original", "centered", "centered_scaled", "post_process", "post_process_fix",
    ]  # fmt: skip
    sample = TokenSample(**results["embeddings"]["token_sample"])
    assert len(sample.text) == 320 and sample.count == sorted(run.corpus.unigram_counts.tolist(), reverse=True)
    assert f"| isotropy Iso | {figures['isotropy']:.3f} |" in (run_dir / "model/README.md").read_text("utf-8")


def test_the_validation_after_training_is_drawn_and_rounded_as_in_training(run_dir: Path, tmp_path: Path) -> None:
    corpus = open_run(run_dir).corpus
    settings = {"train__sampling": "replacement", "evaluation__precision": "bfloat16", "train__steps": 2}
    experiment = tiny_experiment().with_values(**settings, evaluation__final_batches=40)
    train(experiment, corpus, tmp_path / "other", evaluator(experiment, corpus))
    last = MetricsLog(tmp_path / "other" / "metrics.jsonl").read()[-1]
    validation = stages.evaluate(tmp_path / "other", only=["validation"])["validation"]
    assert validation["loss"] == pytest.approx(last["validation_loss"], rel=1e-6)
    assert validation["tokens"] == 40 * 64 > corpus.tokens("validation")


def test_a_second_call_computes_nothing_and_other_weights_everything(run_dir: Path, monkeypatch) -> None:
    first = stages.evaluate(run_dir, only=OFFLINE)
    with monkeypatch.context() as patched:
        patched.setattr(stages, "validate", lambda *args: pytest.fail("validated again"))
        patched.setattr(geometry, "measure", lambda *args, **kwargs: pytest.fail("measured again"))
        assert stages.evaluate(run_dir, only=OFFLINE) == first
    for file in (run_dir / "checkpoints/step-00000024").glob("**/*"):  # back to what was kept of step 20
        file.is_file() and file.unlink()
    second = stages.evaluate(run_dir, only=OFFLINE)
    assert second["validation"]["step"] == 20
    assert second["validation"]["inputs"]["weights"] != first["validation"]["inputs"]["weights"]
    assert second["validation"]["loss"] != first["validation"]["loss"]
    assert second["embeddings"]["figures"] != first["embeddings"]["figures"]


def test_a_validation_from_before_there_were_figures_of_the_logits_is_done_again(run_dir: Path) -> None:
    first = stages.evaluate(run_dir, only=["validation"])["validation"]
    older = {key: value for key, value in first.items() if not key.startswith("log")}
    (run_dir / "evaluation" / "validation.json").write_text(json.dumps(older))
    assert stages.evaluate(run_dir, only=["validation"])["validation"] == first


def test_other_benchmarks_are_measured_anew(run_dir: Path, tmp_path: Path) -> None:
    first = stages.evaluate(run_dir, only=["embeddings"])
    directory = tmp_path / "benchmarks"
    directory.mkdir()
    words = ["river", "lake", "mountain", "sun", "moon", "king", "queen", "dog", "cat", "house", "street"]
    lines = [f"{a}\t{b}\t{i}.5" for i, (a, b) in enumerate(itertools.pairwise(words))]
    (directory / "rw.txt").write_text("\n".join(lines))
    second = stages.evaluate(run_dir, only=["embeddings"], benchmarks=directory)
    assert [b["benchmark"] for b in second["embeddings"]["word_similarity"]["original"]] == ["RW"]
    assert second["embeddings"]["figures"]["isotropy"] == first["embeddings"]["figures"]["isotropy"]


def test_a_model_that_cannot_be_exported_is_refused_before_anything_is_computed(run_dir: Path) -> None:
    file = run_dir / "experiment.toml"
    file.write_text(file.read_text().replace("[model]", '[model]\nnorm = "rmsnorm"'))
    as_of_an_older_version(run_dir / "environment.json", "experiment")
    with pytest.raises(InputError, match="transformers has no gpt2 with rmsnorm"):
        stages.evaluate(run_dir)
    assert not (run_dir / "evaluation").exists()


def test_what_the_other_stages_found_is_kept_where_the_tasks_fail(run_dir: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(run_dir), "--include-path", "nowhere"])
    assert result.exit_code == 1
    assert "perplexity" in result.stdout and "nowhere" in result.stderr
    assert (run_dir / "evaluation" / "embeddings.json").exists() and (run_dir / "model" / "README.md").exists()


def test_the_card_tells_only_of_its_own_weights(run_dir: Path) -> None:
    stages.evaluate(run_dir, only=("validation", "embeddings", "export"))
    path = run_dir / "evaluation" / "validation.json"
    content = read_results(path, "validation")
    content["inputs"]["weights"] = "others"
    write_results(path, content)
    stages.export_run(run_dir)
    card = (run_dir / "model" / "README.md").read_text("utf-8")
    assert "perplexity" not in card and "| isotropy Iso |" in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "validaton"], "validaton: unknown stage; choose from validation, embeddings"),
        (["--benchmarks", "nowhere"], "nowhere: contains no known benchmark"),
        (["--data", "nowhere"], "pass its directory with --data"),
    ],
)
def test_bad_arguments(run_dir: Path, arguments: list[str], message: str) -> None:
    only = [] if "--only" in arguments else ["--only", "embeddings"]
    result = CliRunner().invoke(app, ["evaluate", str(run_dir), *only, *arguments])
    assert isinstance(result.exception, InputError) and message in str(result.exception)


def test_where_results_cannot_be_written_nothing_is_measured(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = stages.evaluate(run_dir, only=["validation"])

    def refuse(**arguments: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(geometry, "measure", lambda *args, **kwargs: pytest.fail("measured in vain"))
    monkeypatch.setattr(stages, "export", lambda *args: pytest.fail("exported in vain"))
    assert stages.evaluate(run_dir, only=["validation"]) == first, "what is known is only read"
    for stage, name in (("embeddings", "evaluation"), ("export", "model")):
        with pytest.raises(InputError, match=rf"run/{name}: cannot be written \(Read-only file system\); choose"):
            stages.evaluate(run_dir, only=[stage])


def test_an_export_of_which_a_file_is_missing_or_changed_is_no_export(run_dir: Path) -> None:
    model = Path(stages.evaluate(run_dir, only=["export"])["export"])
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").unlink()
    stages.evaluate(run_dir, only=["export"])
    assert (model / "model.safetensors").read_bytes() == whole
    (model / "model.safetensors").write_bytes(whole[:-5])
    with pytest.raises(InputError, match=r"model: model\.safetensors was added or changed since this model was made"):
        stages.evaluate(run_dir, only=["export"])


def test_a_card_that_the_user_has_written_stays(run_dir: Path) -> None:
    model = Path(stages.evaluate(run_dir, only=["export"])["export"])
    (model / "README.md").write_text("My own words about this model.")
    stages.evaluate(run_dir, only=["validation", "export"])
    assert (model / "README.md").read_text() == "My own words about this model."


def test_a_damaged_file_is_named(run_dir: Path) -> None:
    stages.evaluate(run_dir, only=["validation"])
    (run_dir / "evaluation" / "validation.json").write_text("{")
    with pytest.raises(InputError, match=r"validation.json: damaged .* delete it"):
        stages.evaluate(run_dir, only=["validation"])


def test_the_command_line(run_dir: Path) -> None:
    arguments = ["evaluate", str(run_dir), "--only", "validation", "--only", "embeddings"]
    printed = CliRunner().invoke(app, arguments)
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert f"perplexity                                    {found['validation']['perplexity']:.2f}\n" in printed.stdout
    target = CliRunner().invoke(app, ["export", str(run_dir), "--out", str(run_dir / "hf")]).stdout.strip()
    assert (Path(target) / "model.safetensors").exists()
    refused = CliRunner().invoke(app, ["export", str(run_dir), "--out", str(run_dir / "evaluation")])
    assert "exists and is not a model made by coupled-adam (it holds embeddings.json" in str(refused.exception)


def test_a_sample_stands_for_all_frequencies() -> None:
    rng = np.random.default_rng(0)
    embedding, counts = rng.normal(size=(1000, 4)) + np.array([3, 0, 0, 0]), rng.permutation(1000)
    sample = sample_tokens(embedding, str, counts, np.arange(4000.0).reshape(1000, 4), limit=11)
    assert sample.count == [999, 899, 799, 699, 599, 499, 400, 300, 200, 100, 0]
    rows = [int(text) for text in sample.text]
    assert counts[rows].tolist() == sample.count
    assert sample.norm == pytest.approx(np.linalg.norm(embedding[rows], axis=1), rel=1e-4)
    mean = embedding.mean(0)
    assert sample.along == pytest.approx(embedding[rows] @ mean / np.linalg.norm(mean), rel=1e-4)
    assert sample.projection == pytest.approx(embedding[rows] @ mean, rel=1e-4)
    assert sample.second_moment == pytest.approx([4 * row + 1.5 for row in rows])
    # The plane is orthonormal and contains the mean: no token is farther from the origin in it than in space.
    assert all(math.hypot(x, y) <= n * 1.0001 for x, y, n in zip(sample.along, sample.across, sample.norm, strict=True))


@pytest.mark.long
def test_a_trained_run_answers_a_local_task_as_its_own_probabilities_say(run_dir: Path, tmp_path: Path) -> None:
    contexts, choices = ["the river", "a dog saw", "over the sun", "king and"], [" lake", " moon", " slowly", " xq"]
    documents = [{"context": c, "choices": choices, "answer": i % 4} for i, c in enumerate(contexts * 3)]
    (tmp_path / "next.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tmp_path / "next.yaml").write_text(
        f"""
task: next
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "next.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )
    run = open_run(run_dir)
    model, encode = run.model(), run.corpus.tokenizer.encode

    def score(context: str, choice: str) -> float:
        tokens, given = torch.tensor([encode(context + choice).ids]), len(encode(context).ids)
        with torch.no_grad():
            log_p = model(tokens[:, :-1]).log_softmax(-1)
        return float(log_p.gather(-1, tokens[:, 1:, None])[0, given - 1 :].sum())

    best = [max(range(4), key=lambda i: score(d["context"], choices[i])) for d in documents]
    right = [b == d["answer"] for b, d in zip(best, documents, strict=True)]
    assert 0 < sum(right) < 12
    arguments = ["evaluate", str(run_dir), "--only", "downstream", "--tasks", "next", "--include-path", str(tmp_path)]
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["downstream"]
    assert found["acc"] == pytest.approx(sum(right) / 12)
    assert found["tasks"]["next"]["n"] == 12 and not found["complete"]
