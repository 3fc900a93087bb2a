"""The training loop."""

import json
import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

from coupled_adam.errors import InputError
from coupled_adam.files import write_json, write_text
from coupled_adam.lm.batches import Batches
from coupled_adam.lm.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from coupled_adam.lm.config import Experiment, Schedule, load_experiment
from coupled_adam.lm.corpus import Corpus
from coupled_adam.lm.model import LanguageModel, build_model
from coupled_adam.lm.progress import progress_bar
from coupled_adam.optim import CoupledAdam, param_groups

Figures = dict[str, float | None]
Evaluate = Callable[[LanguageModel], Figures]


class Interrupted(Exception):
    """The user asked to stop. All that was done is saved."""


class DivergedError(RuntimeError):
    """The loss or the gradient is no longer finite."""


def train(experiment: Experiment, corpus: Corpus, run_dir: Path, evaluate: Evaluate) -> LanguageModel:
    """Train, or go on training, the run in ``run_dir``, and return the trained model.

    Writes experiment.toml, environment.json, metrics.jsonl (a line a step; every ``evaluation.every`` steps also what
    ``evaluate`` says of the model) and checkpoints/. A finished run is only loaded.

    Raises:
        InputError: ``run_dir`` holds a run with other settings or another corpus.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved and the next call goes on from it.
        DivergedError: the loss or gradient norm is not finite; the last checkpoint is intact.
    """
    torch.set_flush_denormal(True)  # products of denormal numbers are a hundred times slower
    _claim(run_dir, experiment, corpus)
    config, every = experiment.train, experiment.evaluation.every
    sequence_length, seed = experiment.data.sequence_length, experiment.run.seed
    model = build_model(experiment.model, corpus.vocabulary_size, sequence_length, seed)
    optimizer = build_optimizer(model, experiment)
    batches = Batches(corpus.shards("train"), sequence_length, experiment.batch_size, seed)
    metrics = Metrics(run_dir / "metrics.jsonl")
    start = 0
    if checkpoint := latest_checkpoint(run_dir / "checkpoints"):
        finished = checkpoint.name == f"step-{config.steps:08d}"
        start = load_checkpoint(checkpoint, model, None if finished else optimizer)["step"]
    metrics.cut_after(start)
    if start == 0:
        metrics.write({"step": 0, "tokens": 0, **evaluate(model)})

    with stop_requested() as stop, progress_bar(experiment.run.name, start, config.steps) as show:
        for step in range(start, config.steps):
            began = time.perf_counter()
            tokens, targets = batches.batch(step)
            loss = model(tokens, targets) / targets.numel()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = clip_grad_norm_(model.parameters(), config.clip)
            _check_finite(step, loss.item(), norm.item())
            lr = set_learning_rate(optimizer, learning_rate(step, experiment.schedule, config.steps))
            optimizer.step()
            done, rate = step + 1, config.batch_tokens / (time.perf_counter() - began)
            line: dict[str, Any] = {"step": done, "tokens": done * config.batch_tokens, "loss": loss.item(), "lr": lr}
            line |= {"grad_norm": norm.item(), "tokens_per_second": round(rate)}
            if done % every == 0 or done == config.steps:
                line |= evaluate(model)
            metrics.write(line)
            show(done, f"loss {line['loss']:.3f}, {rate:,.0f} tokens/s")
            if done % config.checkpoint_every == 0 or done == config.steps or stop.is_set():
                save_checkpoint(run_dir / "checkpoints", done, model, optimizer, {"corpus": corpus.fingerprint})
            if stop.is_set() and done < config.steps:
                raise Interrupted(f"{experiment.run.name}: stopped and saved at step {done} of {config.steps}")
    return model


def build_optimizer(model: LanguageModel, experiment: Experiment) -> Optimizer:
    """AdamW for the core, and for the output embedding what the experiment names; both take the core's moments."""
    core, embedding = experiment.optimizer.core, experiment.optimizer.embedding
    groups = param_groups(model, weight_decay=core.weight_decay)
    if embedding.name == "adamw":
        return AdamW(groups, betas=core.betas, eps=core.eps, fused=True)
    return CoupledAdam(
        groups,
        betas=core.betas,
        eps=core.eps,
        coupling_scale=embedding.coupling_scale,
        coupling_factor=embedding.coupling_factor,
    )


def learning_rate(step: int, schedule: Schedule, steps: int) -> float:
    """Learning rate of step 0, 1, …: lr·step/warm-up, then half a cosine that would reach min_lr at ``steps``."""
    if step < schedule.warmup_steps:
        return schedule.lr * step / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(steps - schedule.warmup_steps, 1)
    return schedule.min_lr + (schedule.lr - schedule.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: Optimizer, lr: float) -> float:
    """Give every group this learning rate, and return it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


class Metrics:
    """metrics.jsonl: one object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All whole lines."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def cut_after(self, step: int) -> None:
        """Drop what was written after the checkpoint that a run goes on from; all of it, if there is none."""
        kept = [line for line in self.read() if line["step"] <= step and step > 0]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


@contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets, so that a step can end; the second one interrupts at once."""
    stop = threading.Event()

    def request(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread alone
        return
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _claim(run_dir: Path, experiment: Experiment, corpus: Corpus) -> None:
    """Write down what this run is, or check that the run already there is the same."""
    file = run_dir / "experiment.toml"
    if file.exists():
        if differences := load_experiment(file).differences(experiment):
            raise InputError(
                f"{run_dir} holds a run with other settings ({'; '.join(differences)}, the first is there): "
                "choose another folder, or the same settings to go on"
            )
        used = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))["corpus"]
        if used != corpus.fingerprint:
            raise InputError(f"{run_dir} holds a run on another text: choose another folder, or the same text to go on")
        return
    packages = {name: version(name) for name in ("coupled-adam", "torch", "numpy", "tokenizers")}
    environment = {
        "python": platform.python_version(),
        "packages": packages,
        "threads": torch.get_num_threads(),
        "corpus": corpus.fingerprint,
    }
    write_json(run_dir / "environment.json", environment)
    write_text(file, experiment.to_toml())


def _check_finite(step: int, loss: float, norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise DivergedError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}; the last checkpoint is intact. "
            "Lower schedule.lr or lengthen schedule.warmup_steps, and start a new run"
        )
