"""The training loop."""

import math
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from coupled_adam import __version__
from coupled_adam.errors import DivergedError, InputError, Interrupted
from coupled_adam.figures import Figures
from coupled_adam.files import lock_in, make_directory, remove_leftovers, write_text
from coupled_adam.lm.batches import Batches
from coupled_adam.lm.checkpoint import (
    intact_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    remove_unfinished,
    save_checkpoint,
    step_of,
)
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.corpus import Corpus
from coupled_adam.lm.estimate import flops_per_token, peak_flops, speed
from coupled_adam.lm.masking import IGNORED, masking_of
from coupled_adam.lm.mean_drift import drift_figures, watch_drift
from coupled_adam.lm.metrics_jsonl import MetricsLog
from coupled_adam.lm.model import LanguageModel, build_model, parameter_count
from coupled_adam.lm.optimizers import Optimizers, build_optimizers
from coupled_adam.lm.parallel import World, no_sync, parallelize
from coupled_adam.lm.run import (
    check_corpus,
    check_run_directory,
    planned_steps,
    read_environment,
    read_experiment,
    trained_longer,
    write_environment,
    write_longer,
)
from coupled_adam.lm.schedule import learning_rate, learning_rate_in_parts
from coupled_adam.lm.tracking import Track, require_trackers, trackers
from coupled_adam.monitor import DriftMonitor
from coupled_adam.progress import progress_bar, say, warn

__all__ = ["Evaluate", "train"]

Evaluate = Callable[[LanguageModel, bool], Figures]
"""Measures a model during training; the second argument says whether it is the last time."""

#: The files of a run that are written whole, under another name at first.
WRITTEN = frozenset({"environment.json", "experiment.toml", "metrics.jsonl", "tracking-id"})


def train(
    experiment: Experiment,
    corpus: Corpus,
    run_dir: Path,
    evaluate: Evaluate,
    world: World | None = None,
    *,
    longer: bool = False,
) -> LanguageModel:
    """Train the run in ``run_dir``, or resume it. A finished run is only loaded.

    It writes experiment.toml, environment.json, metrics.jsonl and checkpoints/. metrics.jsonl has one line per step;
    every ``evaluation.every`` steps it also holds the result of ``evaluate`` and the causes of the movement of the mean
    embedding. Its lines also go to the trackers of the experiment. The number of ranks changes neither the global batch
    nor the result; all ranks call this function together.

    Args:
        experiment: all settings, with the vocabulary of the corpus (``coupled_adam.lm.prepare.resolved``).
        corpus: the text.
        run_dir: directory of the run; created if need be.
        evaluate: measures the model, for instance ``coupled_adam.evaluation.during_training.evaluator``. All ranks call
            it together.
        world: the ranks; None for a single process.
        longer: continue the finished run in ``run_dir`` if ``experiment`` is the same with more steps. The learning
            rates of the additional steps are those of the longer run. So the result is that of a run that was longer
            from the start only if both schedules agree on the earlier steps (``min_lr`` = ``lr``). environment.json
            records the numbers of steps, and the last checkpoint of each part is kept.

    Returns:
        The trained model.

    Raises:
        InputError: ``run_dir`` is in use, or holds a run with other settings or another corpus, an unfinished run that
            is to be trained longer, or foreign files under the names of a run; all checkpoints there are damaged; the
            batch cannot be split over the ranks; a tracker is not installed or cannot be opened.
        Interrupted: on SIGINT or SIGTERM. A checkpoint was saved, and the next call resumes from it.
        DivergedError: the loss or gradient norm is not finite; the last checkpoint is intact.
        OSError: the disk is full; the last checkpoint is intact.
    """
    world = world or World()
    micro = micro_batch(experiment, world)
    world.broadcast_from_main(lambda: require_trackers(experiment.tracking))
    lock = lock_in(run_dir)
    writable, planned = world.broadcast_from_main(lambda: _claim(run_dir, experiment, corpus, lock, longer))
    try:
        prepared = _prepared(experiment, corpus, run_dir, world, planned)
        if prepared.start == experiment.train.steps:
            if world.is_main_process:
                hint = "; a larger train.steps trains it longer" if longer else ""
                say(f"{run_dir}: already finished with {prepared.start:,} steps{hint}")
            return prepared.model
        if not writable:
            raise InputError(
                f"{run_dir}: cannot be written, and its last checkpoint is damaged; copy the run to another place "
                "and resume there"
            )
        with denormals_flushed():
            return _train(prepared, run_dir, evaluate, world, micro)
    finally:
        lock.release()


def _output_embedding(model: LanguageModel) -> Tensor:
    weight: Tensor = model.get_output_embeddings().weight.detach()
    return weight


def root_mean_square(values: Tensor) -> float:
    """Return the root mean square over all elements. All ranks must call it if the tensor is sharded."""
    norm = torch.linalg.vector_norm(values)
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return float(whole) / math.sqrt(values.numel())


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Denormal numbers are 0 meanwhile, for this thread: products of them are a hundred times slower.

    Afterwards the thread computes as it did before, other libraries' numbers and Python's own included.
    """
    before = sys.float_info.min / 2 == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@dataclass(frozen=True)
class Prepared:
    """What the loop works on: everything built, and loaded from the newest checkpoint."""

    experiment: Experiment
    corpus: Corpus
    model: LanguageModel
    wrapped: nn.Module
    """What to call instead of ``model``, so that gradients are averaged over the ranks."""
    optimizers: Optimizers
    batches: Batches
    drift: DriftMonitor | None
    start: int
    """Steps that are done."""
    planned: tuple[int, ...]
    """As ``coupled_adam.lm.run.planned_steps``."""


def _prepared(
    experiment: Experiment, corpus: Corpus, run_dir: Path, world: World, planned: tuple[int, ...]
) -> Prepared:
    sequence_length, seed = experiment.data.sequence_length, experiment.run.seed
    model = build_model(experiment.model, corpus.vocab_size, sequence_length, seed, experiment.loss).to(world.device)
    model.activation_checkpointing = experiment.train.activation_checkpointing
    if experiment.train.compile:
        for block in model.blocks:
            block.compile()
    wrapped = parallelize(model, experiment.parallel, world)
    optimizers = build_optimizers(model, experiment, corpus.unigram_counts)
    drawn = experiment.train.sampling == "replacement"
    shards = corpus.shards("train")
    masking = masking_of(experiment, corpus)
    batches = Batches(shards, sequence_length, experiment.batch_size, seed, corpus.vocab_size, drawn, masking)
    start, state = 0, None
    if checkpoint := intact_checkpoint(run_dir / "checkpoints", world, corpus.fingerprint):
        start = step_of(checkpoint)
        if start > experiment.train.steps:
            raise InputError(
                f"{checkpoint}: belongs to another run: this one has {experiment.train.steps} steps; move it away"
            )
        finished = start == experiment.train.steps
        if world.is_main_process and not finished:
            say(f"{run_dir}: resuming from step {start:,} of {experiment.train.steps:,}")
        state = load_checkpoint(checkpoint, model, [] if finished else optimizers.all, world)
    try:
        drift = watch_drift(experiment, model, optimizers, state)
    except ValueError as error:
        raise InputError(f"{checkpoint}: damaged ({error}); start a new run") from None
    return Prepared(experiment, corpus, model, wrapped, optimizers, batches, drift, start, planned)


def _train(prepared: Prepared, run_dir: Path, evaluate: Evaluate, world: World, micro: int) -> LanguageModel:
    experiment, model, optimizers, drift = prepared.experiment, prepared.model, prepared.optimizers, prepared.drift
    config, every, start = experiment.train, experiment.evaluation.every, prepared.start
    flops, peak = flops_per_token(experiment, parameter_count(model)), peak_flops(experiment, world)
    penalized = experiment.loss.z_loss > 0 or experiment.loss.mu_loss > 0
    done = start
    with (
        recorded(experiment, run_dir, start, world) as write,
        stop_requested() as stop,
        progress_bar(experiment.run.name, start, config.steps, world.is_main_process) as show,
    ):
        if start == 0:
            write({"step": 0, "tokens": 0, **evaluate(model, False), **drift_figures(drift)})
        for step in range(start, config.steps):
            began = time.perf_counter()
            optimizers.zero_grad()
            parts = backward(prepared.wrapped, prepared.batches.batch(step), micro, config.precision, world)
            loss, penalty = world.sum(parts).tolist()
            lr = learning_rate_in_parts(step, experiment.schedule, prepared.planned)
            done, last = step + 1, step + 1 == config.steps
            evaluated = done % every == 0 or last
            before = _output_embedding(model).clone() if evaluated else None
            norm = optimizers.step(lr).item()
            _check_finite(step, loss + penalty, norm)
            rate = config.batch_tokens / (time.perf_counter() - began)
            line: dict[str, Any] = {"step": done, "tokens": done * config.batch_tokens, "loss": loss, "lr": lr}
            if penalized:
                line["penalty"] = penalty
            line |= {"grad_norm": norm, "tokens_per_second": round(rate), "flops_per_second": round(rate * flops)}
            if before is not None:
                moved = root_mean_square(_output_embedding(model) - before)
                line |= evaluate(model, last) | {"embedding_step_rms": moved} | drift_figures(drift)
            write(line)
            show(done, f"loss {loss:.3f}, {rate:,.0f} tokens/s, {speed(rate * flops, peak)}")
            stopping = world.sum(torch.tensor(stop.number)).item() > 0  # whichever rank was asked
            if done % config.checkpoint_every == 0 or last or stopping:
                sums = {} if drift is None else {"drift": drift.state_dict()}
                save_checkpoint(
                    run_dir / "checkpoints",
                    done,
                    model,
                    optimizers.all,
                    {"corpus": prepared.corpus.fingerprint, **sums},
                    world,
                    keep_last=config.keep_last,
                    keep_every=config.keep_every,
                    kept=prepared.planned,
                )
            if stopping:
                break
    if done < config.steps:
        message = f"{experiment.run.name}: stopped and saved at step {done} of {config.steps}"
        raise Interrupted(message, stop.number or signal.SIGTERM)
    return model


def micro_batch(experiment: Experiment, world: World) -> int:
    """Return how many sequences a rank takes at a time. Raises InputError if the batch cannot be split so."""
    if experiment.batch_size % world.size:
        raise InputError(f"a batch of {experiment.batch_size} sequences cannot be split evenly over {world.size} ranks")
    per_rank = experiment.batch_size // world.size
    micro = min(experiment.train.micro_batch or per_rank, per_rank)
    if per_rank % micro:
        raise InputError(
            f"train.micro_batch {micro} does not divide the {per_rank} sequences per step on each of {world.size} "
            "rank(s)"
        )
    return micro


def backward(model: nn.Module, batch: tuple[Tensor, Tensor], micro: int, precision: str, world: World) -> Tensor:
    """Compute gradients of the global batch's mean loss per target, its penalties included.

    Returns:
        This rank's parts of the cross entropy and of the penalties, float64 (2,) on its device.
    """
    count = int((batch[1] != IGNORED).sum())
    tokens, targets = (x.chunk(world.size)[world.rank] for x in batch)
    parted = torch.zeros(2, dtype=torch.float64, device=world.device)
    parts = list(zip(torch.split(tokens, micro), torch.split(targets, micro), strict=True))
    for i, (inputs, wanted) in enumerate(parts):
        with no_sync(model, enabled=i + 1 < len(parts)):
            with torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                losses = model(inputs.to(world.device), wanted.to(world.device))
            # The ranks' gradients are averaged, but their parts of the loss are to be summed.
            (losses.total * (world.size / count)).backward()
        entropy = losses.cross_entropy
        parted += torch.stack([entropy, losses.total.detach() - entropy]) / count
    return parted


@contextmanager
def recorded(experiment: Experiment, run_dir: Path, start: int, world: World) -> Iterator[Track]:
    """Yield a writer for metrics.jsonl and the trackers (rank 0 only)."""
    log = MetricsLog(run_dir / "metrics.jsonl")
    if world.is_main_process:
        log.cut_after(start)
    with trackers(experiment, run_dir, start, world) as track:

        def write(line: dict[str, Any]) -> None:
            if world.is_main_process:
                log.write(line)
                track(line)

        yield write


class Stop:
    """Whether a signal asked to stop, and which one."""

    number = 0


@contextmanager
def stop_requested() -> Iterator[Stop]:
    """Yield a flag that the first SIGINT or SIGTERM sets; a second signal raises KeyboardInterrupt."""
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


def _claim(
    run_dir: Path, experiment: Experiment, corpus: Corpus, lock: FileLock, longer: bool
) -> tuple[bool, tuple[int, ...]]:
    """Record what this run is, or check that the run already there is the same; lock out other processes.

    Returns:
        Whether others are locked out: of a finished run on a disk that cannot be written to they are not; and the
        steps that the run was to have, as ``coupled_adam.lm.run.planned_steps``.
    """
    file = run_dir / "experiment.toml"
    check_run_directory(run_dir, experiment)
    make_directory(run_dir)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"{run_dir}: another process is training there; wait for it, or choose another") from None
    except OSError as error:
        newest = latest_checkpoint(run_dir / "checkpoints")
        if newest is None or step_of(newest) != experiment.train.steps:
            raise InputError(f"{run_dir}: cannot be written ({error.strerror}); choose another place") from None
    try:
        if file.exists():
            there, goes_on = read_experiment(run_dir), longer and trained_longer(run_dir, experiment)
            if not goes_on and (differences := there.differences(experiment)):
                raise InputError(
                    f"{run_dir} already contains a run with different settings ({'; '.join(differences)}); choose "
                    "another directory, or use the same settings to resume"
                )
            check_corpus(run_dir, read_environment(run_dir), corpus)
            if lock.is_locked:
                remove_leftovers(run_dir, WRITTEN.__contains__)
                remove_unfinished(run_dir / "checkpoints")
            if goes_on:
                write_longer(run_dir, experiment)
            planned = planned_steps(read_environment(run_dir), experiment)
            if goes_on:
                warn(_said_of_longer(run_dir, experiment, planned))
            return lock.is_locked, planned
        for caveat in experiment.caveats:
            warn(f"{experiment.run.name}: {caveat}")
        remove_leftovers(run_dir, WRITTEN.__contains__)
        packages = {name: version(name) for name in ("torch", "numpy", "tokenizers")}
        write_environment(
            run_dir,
            experiment,
            corpus,
            python=platform.python_version(),
            packages={"coupled-adam": __version__, **packages},
            threads=torch.get_num_threads(),
        )
        write_text(file, experiment.to_toml())
        return True, (experiment.train.steps,)
    except BaseException:
        lock.release()
        raise


def _said_of_longer(run_dir: Path, experiment: Experiment, planned: tuple[int, ...]) -> str:
    """Say what a run is that goes on after it was finished."""
    *_, done, steps = planned
    begins = f"{run_dir}: finished at step {done:,}, now training to step {steps:,}"
    rates = [learning_rate_in_parts(step, experiment.schedule, planned) for step in range(done + 1)]
    if all(rate == learning_rate(step, experiment.schedule, steps) for step, rate in enumerate(rates)):
        return f"{begins}. The learning rates are those of a run of {steps:,} steps from the start"
    return (
        f"{begins}. From step {done + 1:,} on, the learning rate is that of a run of {steps:,} steps: it goes from "
        f"{rates[-2]:.3g} to {rates[-1]:.3g}. The result differs from that of a run of {steps:,} steps from the start"
    )


def _check_finite(step: int, loss: float, norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise DivergedError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}; the last checkpoint is intact. "
            "Lower schedule.lr or lengthen schedule.warmup_steps, and start a new run"
        )
