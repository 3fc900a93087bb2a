"""Accuracy on downstream tasks, with the harness of the papers: EleutherAI's lm-eval."""

import functools
import importlib.metadata
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coupled_adam.errors import InputError, one_line, require
from coupled_adam.evaluation.results import read_results, write_results
from coupled_adam.evaluation.tasks import Definition, definitions
from coupled_adam.files import check_writable
from coupled_adam.progress import libraries_silenced, say, warn

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

__all__ = ["downstream"]

PAPER_TASKS = ("hellaswag", "winogrande", "arc_easy", "arc_challenge", "truthfulqa_mc2", "lambada_openai", "race")

#: The tasks that changed since the paper's lm-eval 0.4.3, as they were there.
OLDER_VERSIONS = {"truthfulqa_mc2": "truthfulqa_mc2_043", "race": "race_043"}

#: The tasks of the paper in the versions of the paper.
PAPER_TASKS_043 = tuple(OLDER_VERSIONS.get(name, name) for name in PAPER_TASKS)

#: Resamplings behind the standard error of a figure that is no mean, as the perplexity. lm-eval's 100,000 take minutes.
BOOTSTRAP = 1000

Record = dict[str, Any]
"""The content of downstream.json, as ``downstream`` describes it."""


def downstream(
    model_dir: Path,
    out: Path,
    *,
    digest: str,
    tasks: Sequence[str] = PAPER_TASKS,
    limit: int | None = None,
    include_path: Path | None = None,
    batch_size: int = 16,
    device: str | None = None,
) -> Record:
    """Evaluate an exported model on downstream tasks with lm-eval, in one process.

    A result in ``out`` is reused if digest, task, version, limit, definition (with the files that it names) and version
    of lm-eval are the same. The model is loaded only if a result is missing, in the precision of the directory. The
    number of examples in the prompt is that of the task definition, by default none.

    Args:
        model_dir: a Hugging Face model directory.
        out: JSON file, written after each task.
        digest: identifies the weights and the tokenizer.
        tasks: names of lm-eval tasks; by default the seven of the paper.
        limit: samples per task, at least 1; None for all.
        include_path: directory of further task definitions (YAML of lm-eval), which take precedence.
        batch_size: sequences per forward pass.
        device: for instance ``"cuda"``; None for a GPU if there is one.

    Returns:
        A dictionary. ``acc`` is the mean accuracy over the tasks ``mean_over`` (the ``n_tasks`` that ran and have an
        accuracy), in [0, 1], and ``acc_stderr`` its standard error √(Σ s²)/n. ``complete`` says whether these are the
        seven tasks of the paper, in either version. ``settings`` are the arguments, ``tasks`` the results per task,
        ``failed`` the reasons why tasks were not run, mostly missing data, and ``earlier`` other results for the same
        digest. A value that is not defined is None.

    Raises:
        InputError: a task is unknown, ``limit`` is below 1, ``model_dir`` has no model, or ``out`` is another file.
        ImportError: lm-eval is not installed; the message names the extra.

    Examples:
        ```python
        results = downstream(Path("run/model"), Path("downstream.json"), digest="v1", tasks=["arc_easy"], limit=100)
        print(results["acc"], results["acc_stderr"])
        ```
    """
    require("eval", "lm_eval", "accelerate")
    import datasets

    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: at least 1 sample per task, or None for all")
    names = list(dict.fromkeys(tasks))
    harness = f"lm-eval {importlib.metadata.version('lm_eval')}"
    settings: Record = {"model_digest": digest, "tasks": names, "limit": limit, "harness": harness}
    settings |= {"batch_size": batch_size, "device": device or ("cuda" if torch.cuda.is_available() else "cpu")}
    results = Results(out, settings)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        manager, defined = stack.enter_context(definitions(names, include_path))
        stack.callback(setattr, datasets.config, "HF_HUB_OFFLINE", datasets.config.HF_HUB_OFFLINE)
        model = functools.cache(lambda: _load(model_dir, batch_size, settings["device"]))
        missing = [d for d in defined if not results.reuse(d)]
        if missing:
            check_writable(out.parent, out)
        for i, d in enumerate(missing, start=1):
            say(f"[{i}/{len(missing)}] {d.name}")
            _run_one(d, manager, model, results)
    return results.write()


class Results:
    """The results of an evaluation, kept in a file after each task."""

    def __init__(self, out: Path, settings: Record) -> None:
        """Raises InputError if ``out`` is something else."""
        self.out, self.settings = out, settings
        self.earlier = _earlier(out, settings["model_digest"])
        self.tasks: dict[str, Record] = {}
        self.failed: dict[str, str] = {}

    def key(self, d: Definition) -> Record:
        """Return all that determines the result of a task for this model."""
        return {
            "task": d.name,
            "version": d.version,
            "limit": self.settings["limit"],
            "definition": d.digest,
            "harness": self.settings["harness"],
        }

    def reuse(self, d: Definition) -> bool:
        """Take over an earlier result of the task, if there is one."""
        kept = self.earlier.pop(_key(self.key(d)), None)
        if kept:
            say(f"{d.name}: {_line(kept)}, from {self.out.name}")
            self.tasks[d.name] = kept
        return kept is not None

    def add(self, d: Definition, figures: Record) -> None:
        """Keep the figures of a task, and write the file."""
        used = {name: self.settings[name] for name in ("batch_size", "device")}
        self.tasks[d.name] = self.key(d) | figures | used
        self.write()

    def fail(self, d: Definition, reason: str) -> None:
        """Record why a task has no result."""
        self.failed[d.name] = reason
        warn(f"{d.name}: {reason}")

    def write(self) -> Record:
        """Write the file, and return what it holds."""
        ordered = {name: self.tasks[name] for name in self.settings["tasks"] if name in self.tasks}
        result = mean_accuracy(ordered) | {"settings": self.settings, "tasks": ordered, "failed": self.failed}
        result["earlier"] = list(self.earlier.values())
        write_results(self.out, result)
        return result


def _run_one(d: Definition, manager: "TaskManager", model: "Callable[[], HFLM]", results: Results) -> None:
    import datasets

    started = time.monotonic()
    try:
        with libraries_silenced():
            task = manager.load([d.name])["tasks"][d.name]
    except Exception as error:  # definitions and datasets are the code of others: any error may come
        # The hub is tried for half a minute, again for each task. What lies in the cache is found without it.
        datasets.config.HF_HUB_OFFLINE |= isinstance(error, ConnectionError)
        results.fail(d, f"not run: {_reason(d, error)}")
        return
    with libraries_silenced():
        lm = model()
        try:
            figures, problem = _evaluate(lm, task, results.settings["limit"]), None
        except Exception as error:  # of the task's own code, or of what its samples ask of the model
            problem = f"failed while running: {type(error).__name__}: {one_line(error)}"
    if problem is not None:
        results.fail(d, problem)
        return
    results.add(d, figures)
    say(f"{d.name}: {_line(results.tasks[d.name])}, {time.monotonic() - started:.0f} s")


def mean_accuracy(results: Mapping[str, Record]) -> Record:
    """Average ``acc`` over ``results``, with its standard error √(Σ s²)/n and the tasks that it covers.

    The standard errors are taken for those of independent figures, as the paper does.
    """
    counted = [name for name, result in results.items() if result["acc"] is not None]
    n, errors = len(counted), [results[name]["acc_stderr"] for name in counted]
    known = n > 0 and None not in errors
    current = {older: name for name, older in OLDER_VERSIONS.items()}
    return {
        "acc": sum(results[name]["acc"] for name in counted) / n if n else None,
        "acc_stderr": math.sqrt(sum(s * s for s in errors)) / n if known else None,
        "n_tasks": n,
        "mean_over": counted,
        "complete": sorted(current.get(name, name) for name in counted) == sorted(PAPER_TASKS),
    }


def _load(model_dir: Path, batch_size: int, device: str) -> "HFLM":
    """Load the model as lm-eval wants it. Given a path instead, lm-eval would join torchrun's process group."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from coupled_adam.evaluation.harness_model import HarnessModel

    if not (model_dir / "config.json").is_file():
        raise InputError(f"{model_dir}: not a Hugging Face model directory (config.json is missing)")
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    return HarnessModel(pretrained=model.to(device), tokenizer=tokenizer, batch_size=batch_size)


def _evaluate(lm: "HFLM", task: "Task", limit: int | None) -> Record:
    """Figures of one task.

    ``lm_eval.evaluate`` and not ``simple_evaluate``: the latter seeds the generators of the whole process, asks the hub
    for a model of the directory's name, and collects facts of the machine, all of it again for each task.
    """
    from lm_eval import evaluate

    name = task.config.task
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(1234)  # that of simple_evaluate
    outcome = evaluate(
        lm=lm, task_dict={"tasks": {name: task}}, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False
    )
    metrics: dict[str, float | None] = {}
    for key, value in outcome["results"][name].items():
        metric, _, filtered = key.partition(",")
        if filtered:  # else it is no figure, but the task's name and the like
            metrics[metric if filtered == "none" else key] = _number(value)
    return {
        "n": outcome["n-samples"][name]["effective"],
        "num_fewshot": outcome["n-shot"][name],
        "acc": metrics.pop("acc", None),
        "acc_stderr": metrics.pop("acc_stderr", None),
        "metrics": metrics,
    }


def _number(value: object) -> float | None:
    """Convert to a number, if it is one: lm-eval gives "N/A" for the standard error of one sample."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _reason(definition: Definition, error: Exception) -> str:
    """Why a task could not be loaded, and what helps."""
    what = f"{type(error).__name__}: {one_line(error)}"
    if not definition.dataset or not isinstance(error, OSError | ValueError):
        return what
    arguments = ", ".join(map(repr, definition.dataset))
    return (
        f"its dataset {definition.dataset[0]} is not on this machine and cannot be downloaded from the Hugging Face "
        f'Hub ({what}). Where there is network access, run the same command, or python -c "import datasets; '
        f'datasets.load_dataset({arguments})", and copy the directory HF_HOME (~/.cache/huggingface) here; or define '
        "the task over local files in a directory for --include-path"
    )


def _key(record: Record) -> tuple[Any, ...]:
    return tuple(record[k] for k in ("task", "version", "limit", "definition", "harness"))


def _earlier(out: Path, digest: str) -> dict[tuple[Any, ...], Record]:
    """Read the results in ``out`` for the same model."""
    if not out.exists():
        return {}
    try:
        stored = read_results(out, "downstream")
        if stored["settings"]["model_digest"] != digest:
            return {}
        return {_key(record): record for record in [*stored["earlier"], *stored["tasks"].values()]}
    except (InputError, KeyError, TypeError) as error:
        raise InputError(f"{out}: not a result of this evaluation; move it away ({error})") from None


def _line(record: Record) -> str:
    error = "" if record["acc_stderr"] is None else f" ± {record['acc_stderr']:.4f}"
    accuracy = "no acc" if record["acc"] is None else f"acc {record['acc']:.4f}{error}"
    return f"{accuracy}, {record['n']} samples"


@contextmanager
def _quiet() -> Iterator[None]:
    """Have lm-eval and the libraries under it log errors alone, and start no processes of their own."""
    with ExitStack() as stack:
        for name in ("lm_eval", "datasets", "huggingface_hub", "transformers"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        if "DISABLE_MULTIPROC" not in os.environ:
            os.environ["DISABLE_MULTIPROC"] = "1"  # else the bootstrap forks as often as there are cores
            stack.callback(os.environ.pop, "DISABLE_MULTIPROC", None)
        yield
