"""A run is the same run on any number of processes, however it is cut up, stopped and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
import torch

from coupled_adam.errors import InputError
from coupled_adam.evaluation.stages import evaluate
from coupled_adam.lm import train as loop
from coupled_adam.lm.checkpoint import latest_checkpoint
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.corpus import Corpus
from coupled_adam.lm.parallel import World
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.sources import TextFiles

pytestmark = pytest.mark.long


@pytest.fixture
def corpus(tiny: Experiment, text_file: Path, tmp_path: Path) -> Corpus:
    return prepare(TextFiles(text_file), tiny.data, tmp_path / "corpus")


def series(run_dir: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def losses(run_dir: Path) -> list[float]:
    return series(run_dir, "loss")


def drift(run_dir: Path) -> list[float]:
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    return [last["drift_second_moments"], last["drift_gradients"], last["drift_decay"]]


@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (2, {"parallel__strategy": "ddp", "train__micro_batch": 1}),
        (2, {"parallel__strategy": "fsdp", "train__micro_batch": 1}),
        (4, {"parallel__strategy": "hsdp", "parallel__shard_size": 2}),
        (1, {"train__micro_batch": 2}),
        (1, {"train__activation_checkpointing": True}),
        # AdamW and Coupled Adam do not know of matrices: to them it is the same run.
        (2, {"parallel__strategy": "fsdp", "model__qkv": "heads"}),
    ],
)
def test_one_process_or_many_one_batch_or_parts(count, settings, processes, tiny, corpus, tmp_path) -> None:
    whole = runs.run(tiny.to_toml(), corpus.directory, tmp_path / "whole")
    experiment = tiny.with_values(**settings)
    for result in processes(count).run(runs.run, experiment.to_toml(), corpus.directory, tmp_path / "run"):
        torch.testing.assert_close(result["embedding"], whole["embedding"], rtol=0, atol=1e-6)
        assert result["figures"] == pytest.approx(whole["figures"], rel=1e-5, abs=1e-6)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
    assert drift(tmp_path / "run") == pytest.approx(drift(tmp_path / "whole"), abs=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("embedding", ["adamw", "coupled_adam"])
def test_penalties_and_centering_are_those_of_the_batch_not_of_its_parts(
    strategy, embedding, processes, tiny, corpus, tmp_path
) -> None:
    terms = {"loss__z_loss": 0.1, "loss__mu_loss": 3000.0, "loss__softcap": 2.0, "model__tied": False}
    centered = {"optimizer__embedding__name": embedding, "optimizer__embedding__center": embedding == "coupled_adam"}
    experiment = tiny.with_values(**terms, **centered)
    whole = runs.run(experiment.to_toml(), corpus.directory, tmp_path / "whole")
    parts = experiment.with_values(parallel__strategy=strategy, train__micro_batch=1)
    for result in processes(2).run(runs.run, parts.to_toml(), corpus.directory, tmp_path / "run"):
        torch.testing.assert_close(result["embedding"], whole["embedding"], rtol=0, atol=2e-6)
        assert result["figures"] == pytest.approx(whole["figures"], rel=1e-5, abs=2e-6)
    for key in ("loss", "penalty", "grad_norm"):
        assert series(tmp_path / "run", key) == pytest.approx(series(tmp_path / "whole", key), rel=1e-5, abs=2e-6)
    assert min(series(tmp_path / "whole", "penalty")) > 0.1
    assert (whole["embedding"].mean(0).norm() < 1e-6) == (embedding == "coupled_adam")


def test_a_run_goes_on_with_another_number_of_processes(processes, tiny, corpus, tmp_path) -> None:
    whole = runs.run(tiny.to_toml(), corpus.directory, tmp_path / "whole")
    toml = tiny.with_values(parallel__strategy="fsdp").to_toml()
    for first, then in ((2, 1), (1, 4)):
        directory = tmp_path / f"from-{first}"
        stopped = processes(first).run(runs.run, toml, corpus.directory, directory, stop_at=2)
        assert all(s == {"stopped": "tiny: stopped and saved at step 8 of 24", "signal": s["signal"]} for s in stopped)
        for result in processes(then).run(runs.run, toml, corpus.directory, directory):
            torch.testing.assert_close(result["embedding"], whole["embedding"], rtol=0, atol=1e-6)
        assert losses(directory) == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
        assert drift(directory) == pytest.approx(drift(tmp_path / "whole"), abs=1e-6)


def test_a_batch_that_cannot_be_shared_out_is_refused(tiny) -> None:
    with pytest.raises(InputError, match="a batch of 4 sequences cannot be split evenly over 3 ranks"):
        loop.micro_batch(tiny, World(0, 3))
    with pytest.raises(InputError, match="micro_batch 3 does not divide the 4 sequences"):
        loop.micro_batch(tiny.with_values(train__micro_batch=3), World())


def script(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(Path(__file__).parent / name), *map(str, arguments)]


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_killed_twenty_times_at_random_it_ends_as_the_undisturbed_one(tiny, corpus, tmp_path) -> None:
    experiment = tiny.with_values(train__checkpoint_every=3, train__steps=200, optimizer__embedding__name="adamw")
    (tmp_path / "run.toml").write_text(experiment.to_toml())
    arguments = (tmp_path / "run.toml", corpus.directory)
    killed = subprocess.run(
        script("kill_run.py", *arguments, tmp_path / "run"), env=ONE_THREAD, text=True, capture_output=True, timeout=200
    )
    assert killed.returncode == 0, killed.stderr
    places = killed.stdout.split()
    assert len(places) == 20 and len(set(places)) > 3, places
    subprocess.run(script("runs.py", *arguments, tmp_path / "run"), env=ONE_THREAD, check=True)
    subprocess.run(script("runs.py", *arguments, tmp_path / "whole"), env=ONE_THREAD, check=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    finished = [runs.run(experiment.to_toml(), corpus.directory, tmp_path / name) for name in ("run", "whole")]
    assert torch.equal(finished[0]["embedding"], finished[1]["embedding"])


def test_a_second_process_in_the_same_folder_is_refused(tiny, corpus, tmp_path) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text(tiny.with_values(train__steps=100_000).to_toml())
    first = subprocess.Popen(script("runs.py", toml, corpus.directory, tmp_path / "run"), env=ONE_THREAD)
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.1)
            assert first.poll() is None
        with pytest.raises(InputError, match="another process is training there"):
            runs.run(toml.read_text(), corpus.directory, tmp_path / "run")
    finally:
        first.kill()
        first.wait()


def test_sigterm_saves_and_the_exit_status_says_so(tmp_path, text_file) -> None:
    arguments = ["mini-S-300V", "train.steps=2000", "data.vocab_size=300", "--out", str(tmp_path / "run")]
    corpus = prepare(
        TextFiles(text_file),
        Experiment.from_dict({"run": {"name": "x"}, "data": {"vocab_size": 300}}).data,
        tmp_path / "corpus",
    )
    command = [sys.executable, "-m", "coupled_adam", "train", *arguments, "--data", str(corpus.directory)]
    process = subprocess.Popen(command, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 5:
        time.sleep(0.2)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped and saved at step" in errors and "Rerun the same command to resume" in errors
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") is not None


def test_a_worker_that_dies_under_torchrun_is_restarted_and_goes_on(tiny, corpus, tmp_path) -> None:
    (tmp_path / "run.toml").write_text(tiny.to_toml())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = script("runs.py", tmp_path / "run.toml", corpus.directory, tmp_path / "run")[1:]
    command = [*torchrun, "--max-restarts", "1", *worker]
    # torchrun's store outlives the processes that die, and their successors may find old addresses in it.
    environment = {**ONE_THREAD, "DIE_AT_STEP": "15", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    runs.run(tiny.to_toml(), corpus.directory, tmp_path / "whole")
    assert "step 11 of 24" in done.stderr, "the first line after the restart"
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_three_processes_evaluate_batches_of_four_as_one_does(strategy, processes, tiny, corpus, tmp_path) -> None:
    experiment = tiny.with_values(parallel__strategy=strategy, optimizer__embedding__name="adamw")
    runs.run(experiment.to_toml(), corpus.directory, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    together, nothing, _ = processes(3).run(runs.evaluated, tmp_path / "run")
    alone = evaluate(tmp_path / "alone", only=("validation", "embeddings", "export"))
    assert nothing == {}
    for key in ("loss", "logit_mean", "logit_std", "logit_max", "log_z_squared"):
        assert together["validation"][key] == pytest.approx(alone["validation"][key], rel=1e-6, abs=1e-6)
    assert together["embeddings"] == alone["embeddings"]
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "alone")]
    assert weights[0] == weights[1]
