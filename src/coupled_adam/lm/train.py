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
from filelock import FileLock, Timeout
from torch import Tensor, nn

from coupled_adam.errors import InputError
from coupled_adam.files import write_json, write_text
from coupled_adam.lm.batches import Batches
from coupled_adam.lm.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, step_of
from coupled_adam.lm.config import Experiment, Schedule, load_experiment
from coupled_adam.lm.corpus import Corpus
from coupled_adam.lm.estimate import flops_per_token, peak_flops, speed
from coupled_adam.lm.model import LanguageModel, build_model, parameter_count
from coupled_adam.lm.optimizers import build_optimizers
from coupled_adam.lm.parallel import World, gradients_wait, share
from coupled_adam.lm.progress import progress_bar
from coupled_adam.lm.tracking import Track, require_trackers, trackers

Figures = dict[str, float | None]
Evaluate = Callable[[LanguageModel, bool], Figures]


class Interrupted(Exception):
    """The user, or who runs the machine, asked to stop. All that was done is saved."""

    def __init__(self, message: str, signal_number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class DivergedError(RuntimeError):
    """The loss or the gradient is no longer finite."""


def train(
    experiment: Experiment, corpus: Corpus, run_dir: Path, evaluate: Evaluate, world: World | None = None
) -> LanguageModel:
    """Train, or go on training, the run in ``run_dir``, and return the trained model.

    Writes experiment.toml, environment.json, metrics.jsonl (a line a step; every ``evaluation.every`` steps also what
    ``evaluate`` says of the model, which is told whether it is the last time) and checkpoints/; the lines of
    metrics.jsonl go to the trackers of the experiment too. A finished run is only loaded. In several processes the
    global batch, and so the run, is the same; all call this and ``evaluate`` together.

    Raises:
        InputError: ``run_dir`` is in use, or holds a run with other settings or another corpus; or the batch cannot be
            shared out to the processes; or a tracker is not installed or cannot be opened.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved and the next call goes on from it.
        DivergedError: the loss or gradient norm is not finite; the last checkpoint is intact.
    """
    world = world or World()
    torch.set_flush_denormal(True)  # products of denormal numbers are a hundred times slower
    micro = micro_batch(experiment, world)
    world.from_main(lambda: require_trackers(experiment.tracking))
    lock = FileLock(run_dir / ".lock")
    world.from_main(lambda: _claim(run_dir, experiment, corpus, lock))
    try:
        return _train(experiment, corpus, run_dir, evaluate, world, micro)
    finally:
        lock.release()


def _train(
    experiment: Experiment, corpus: Corpus, run_dir: Path, evaluate: Evaluate, world: World, micro: int
) -> LanguageModel:
    config, every = experiment.train, experiment.evaluation.every
    sequence_length, seed = experiment.data.sequence_length, experiment.run.seed
    model = build_model(experiment.model, corpus.vocabulary_size, sequence_length, seed).to(world.device)
    flops, peak = flops_per_token(experiment, parameter_count(model)), peak_flops(experiment, world)
    model.activation_checkpointing = config.activation_checkpointing
    if config.compile:
        for block in model.blocks:
            block.compile()
    shared = share(model, experiment.parallel, world)
    optimizers = build_optimizers(model, experiment)
    batches = Batches(corpus.shards("train"), sequence_length, experiment.batch_size, seed, corpus.vocabulary_size)
    start = done = 0
    checkpoints = run_dir / "checkpoints"
    checkpoint = world.from_main(lambda: latest_checkpoint(checkpoints))
    if checkpoint:
        finished = step_of(checkpoint) == config.steps
        start = done = load_checkpoint(checkpoint, model, [] if finished else optimizers.all)["step"]

    with (
        recorded(experiment, run_dir, start, world) as write,
        stop_requested() as stop,
        progress_bar(experiment.run.name, start, config.steps, world.main) as show,
    ):
        if start == 0:
            write({"step": 0, "tokens": 0, **evaluate(model, False)})
        for step in range(start, config.steps):
            began = time.perf_counter()
            optimizers.zero_grad()
            loss = backward(shared, batches.batch(step), micro, config.precision, world)
            loss = world.sum(torch.tensor(loss, dtype=torch.float64)).item()
            lr = learning_rate(step, experiment.schedule, config.steps)
            norm = optimizers.step(lr).item()
            _check_finite(step, loss, norm)
            done, rate, last = step + 1, config.batch_tokens / (time.perf_counter() - began), step + 1 == config.steps
            line: dict[str, Any] = {"step": done, "tokens": done * config.batch_tokens, "loss": loss, "lr": lr}
            line |= {"grad_norm": norm, "tokens_per_second": round(rate), "flops_per_second": round(rate * flops)}
            if done % every == 0 or last:
                line |= evaluate(model, last)
            write(line)
            show(done, f"loss {loss:.3f}, {rate:,.0f} tokens/s, {speed(rate * flops, peak)}")
            stopping = world.sum(torch.tensor(stop.number)).item() > 0  # whichever of the processes was asked
            if done % config.checkpoint_every == 0 or last or stopping:
                state = {"corpus": corpus.fingerprint}
                save_checkpoint(checkpoints, done, model, optimizers.all, state, world, config.keep_every)
            if stopping:
                break
    if done < config.steps:
        message = f"{experiment.run.name}: stopped and saved at step {done} of {config.steps}"
        raise Interrupted(message, stop.number or signal.SIGTERM)
    return model


def micro_batch(experiment: Experiment, world: World) -> int:
    """Sequences that a process takes at a time. Raises InputError if the batch cannot be shared out so."""
    batch, processes = experiment.batch_size, world.size
    if batch % processes:
        raise InputError(f"a batch of {batch} sequences cannot be shared out to {processes} processes equally")
    share_of_batch = batch // processes
    micro = min(experiment.train.micro_batch or share_of_batch, share_of_batch)
    if share_of_batch % micro:
        raise InputError(
            f"train.micro_batch {micro} does not divide the {share_of_batch} sequences that each of the {processes} "
            f"process(es) has of a step"
        )
    return micro


def backward(model: nn.Module, batch: tuple[Tensor, Tensor], micro: int, precision: str, world: World) -> float:
    """Gradients of the mean loss per token of the global batch. Returns this process's part of that loss."""
    count = batch[0].numel()
    tokens, targets = (x.chunk(world.size)[world.rank] for x in batch)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    parts = list(zip(torch.split(tokens, micro), torch.split(targets, micro), strict=True))
    for i, (inputs, wanted) in enumerate(parts):
        with gradients_wait(model, wait=i + 1 < len(parts)):
            with torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                loss = model(inputs.to(world.device), wanted.to(world.device)) / count
            # The processes' gradients are averaged, and the parts of the loss are to be summed.
            (loss * world.size).backward()
        total += loss.detach()
    return total.item()  # once: on an accelerator reading a number waits for it


def learning_rate(step: int, schedule: Schedule, steps: int) -> float:
    """Learning rate of step 0, 1, …: lr·step/warm-up, then half a cosine that would reach min_lr at ``steps``."""
    if step < schedule.warmup_steps:
        return schedule.lr * step / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(steps - schedule.warmup_steps, 1)
    return schedule.min_lr + (schedule.lr - schedule.min_lr) * (1 + math.cos(math.pi * progress)) / 2


class Metrics:
    """metrics.jsonl: one object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All whole lines. Raises InputError naming a damaged one."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        found = []
        for number, line in enumerate(lines, start=1):
            try:
                if line.endswith("\n"):
                    found.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(f"{self.path}: line {number} is damaged ({error})") from None
        return found

    def cut_after(self, step: int) -> None:
        """Drop what was written after the checkpoint that a run goes on from; all of it, if there is none."""
        kept = [line for line in self.read() if line["step"] <= step and step > 0]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


@contextmanager
def recorded(experiment: Experiment, run_dir: Path, start: int, world: World) -> Iterator[Track]:
    """What writes a line to metrics.jsonl and to the trackers; it does so in the main process alone."""
    metrics = Metrics(run_dir / "metrics.jsonl")
    if world.main:
        metrics.cut_after(start)
    with trackers(experiment, run_dir, start, world) as track:

        def write(line: dict[str, Any]) -> None:
            if world.main:
                metrics.write(line)
                track(line)

        yield write


class Stop:
    """Whether a signal asked to stop, and which one."""

    number = 0


@contextmanager
def stop_requested() -> Iterator[Stop]:
    """What the first SIGINT or SIGTERM sets, so that a step can end; the second one interrupts at once."""
    stop = Stop()

    def request(number: int, frame: FrameType | None) -> None:
        if stop.number:
            raise KeyboardInterrupt
        stop.number = number

    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread alone
        return
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _claim(run_dir: Path, experiment: Experiment, corpus: Corpus, lock: FileLock) -> None:
    """Write down what this run is, or check that the run already there is the same; nobody else may work on it."""
    file = run_dir / "experiment.toml"
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{run_dir}: another process is training there; wait for it, or choose another") from None
    if file.exists():
        if differences := load_experiment(file).differences(experiment):
            lock.release()
            raise InputError(
                f"{run_dir} holds a run with other settings ({'; '.join(differences)}, the first is there): "
                "choose another folder, or the same settings to go on"
            )
        used = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))["corpus"]
        if used != corpus.fingerprint:
            lock.release()
            raise InputError(f"{run_dir} holds a run on another text: choose another folder, or the same text to go on")
        return
    packages = {name: version(name) for name in ("coupled-adam", "torch", "numpy", "tokenizers")}
    environment = {
        "python": platform.python_version(),
        "packages": packages,
        "threads": torch.get_num_threads(),
        "corpus": corpus.fingerprint,
        "corpus_folder": str(corpus.folder.resolve()),
    }
    write_json(run_dir / "environment.json", environment)
    write_text(file, experiment.to_toml())


def _check_finite(step: int, loss: float, norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise DivergedError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}; the last checkpoint is intact. "
            "Lower schedule.lr or lengthen schedule.warmup_steps, and start a new run"
        )
