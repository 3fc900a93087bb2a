"""Directories of runs as evaluation leaves them, with made-up figures: nothing is trained."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from coupled_adam.lm.config import Experiment
from coupled_adam.report.aggregate import DIVERGED, LOGITS

VARIANTS = ("original", "centered", "centered_scaled", "post_process", "post_process_fix")


def write_run(
    directory: Path, name: str, seed: int = 1, loss: float = 6.0, figures: dict[str, Any] | None = None, **values: Any
) -> Path:
    """A run of 8 steps; ``values`` as of ``Experiment.with_values``."""
    experiment = Experiment.from_dict(
        {
            "run": {"name": f"{name}-s{seed}", "seed": seed},
            "model": {"n_layers": 1, "n_heads": 1, "hidden_size": 8},
            "data": {"vocab_size": 300, "sequence_length": 16},
            "train": {"steps": 8, "batch_tokens": 64},
            "schedule": {"warmup_steps": 1},
        }
    ).with_values(**values)
    run = directory / experiment.run.name
    (run / "evaluation").mkdir(parents=True)
    (run / "experiment.toml").write_text(experiment.to_toml())
    figures = {"isotropy": 0.5, "mean_shift_ratio": 0.5, "word_similarity": 10.0, "mean_of_norms": 1.0} | (
        figures or {}
    )
    uneven = 0.1 if experiment.optimizer.embedding.name == "adamw" else 0.0
    lines = [
        {"step": s, "validation_loss": loss + 8 / (s + 1), **figures}
        | {"drift_second_moments": uneven * s, "drift_gradients": 0.01 * s, "drift_decay": 0.0}
        | {"norm_of_mean": (uneven + 0.01) * s + 0.02}
        for s in range(0, 9, 2)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    validation = {
        "inputs": {"weights": "w"},
        "step": experiment.train.steps,
        "loss": loss,
        "perplexity": math.exp(loss),
        "tokens": 512,
        **{name: figures[name] for name in LOGITS if name in figures},
    }
    (run / "evaluation" / "validation.json").write_text(json.dumps(validation))
    (run / "evaluation" / "embeddings.json").write_text(json.dumps(embeddings(figures, experiment)))
    return run


def embeddings(figures: dict[str, Any], experiment: Experiment) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    count = sorted(rng.integers(0, 1000, 60).tolist(), reverse=True)
    adam = experiment.optimizer.embedding.name == "adamw"
    benchmark = {"benchmark": "MEN", "cosine": 12.5, "dot": None, "covered": 40, "pairs": 3000}
    return {
        "inputs": {"weights": "w"},
        "step": experiment.train.steps,
        "figures": figures,
        "word_similarity": {variant: [benchmark] for variant in VARIANTS},
        "singular_values": [8.0, 4.0, 2.0, 1.0],
        "token_sample": {
            "text": [f"<t{i}>" for i in range(60)],
            "count": count,
            "norm": rng.random(60).tolist(),
            "projection": rng.random(60).tolist(),
            "along": rng.normal(size=60).tolist(),
            "across": rng.normal(size=60).tolist(),
            "second_moment": [1e-6 * (c + 1) for c in count] if adam else None,
        },
    }


def write_suite(directory: Path) -> None:
    """Two models, two data sizes, two seeds, AdamW and Coupled Adam; a scaled family and one of SGD."""
    for width in (8, 16):
        for steps in (8, 16):
            for seed in (1, 2):
                common = {"model__hidden_size": width, "train__steps": steps}
                name, noise = f"w{width}-{steps}", 0.01 * seed
                a = {"isotropy": 0.3 + noise, "mean_shift_ratio": 0.7 + noise, "second_moment_frequency_fit": 0.9}
                write_run(directory, f"{name}A", seed, 6.1 + noise, a, **common)
                v = {"isotropy": 0.9 + noise, "mean_shift_ratio": 0.02 + noise / 10}
                write_run(
                    directory, f"{name}V", seed, 6.0 + noise, v, optimizer__embedding__name="coupled_adam", **common
                )
    for scale in (0.5, 2.0):
        values = {"optimizer__embedding__name": "coupled_adam", "optimizer__embedding__coupling_scale": scale}
        write_run(directory, f"scaled-{scale}", 1, 6.0 + scale / 10, **values)
    for factor in (100.0, 200.0):
        values = {"optimizer__embedding__name": "sgd", "optimizer__embedding__lr_factor": factor}
        write_run(directory, f"sgd-{factor:g}", 1, 6.0 + factor / 1000, **values)


#: Learning rates of the made-up sweeps, and the distance of the loss from its best at each, in units of ``steepness``.
RATES, STEEP = (1e-3, 1e-2, 1e-1), (0.5, 0.0, 3.0)

#: Parts of an experiment by method, and how steeply its loss depends on the rate.
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "adamw": ({}, 0.6),
    "center": ({"optimizer__embedding__center": True}, 0.1),
    "z-loss": ({"loss__z_loss": 1e-4}, 0.3),
    "coupled": ({"optimizer__embedding__name": "coupled_adam"}, 0.2),
}


def write_sweeps(directory: Path) -> None:
    """Four methods over three learning rates, with a float32 and a bfloat16 head, where AdamW diverges at 0.1.

    And Coupled Adam with two other optimizers inside.
    """
    for rate, above in zip(RATES, STEEP, strict=True):
        common = {"schedule__lr": rate, "schedule__min_lr": 1e-5, "model__tied": False}
        for method, (values, steepness) in METHODS.items():
            off = 1e-8 if method == "center" else 0.05 if method == "coupled" else 100 * rate
            figures = {"norm_of_mean": off, "mean_shift_ratio": off / (off + 1), "isotropy": 1 / (1 + off)}
            figures |= {"logit_max": 10 + 20 * off, "logit_mean": -20 * off, "logit_std": 3.0, "log_z_squared": 100.0}
            for head, factor in (("float32", 1.0), ("bfloat16", 2.0)):
                loss = 5.0 + factor * steepness * above
                name = f"{head}-{method}-{rate:g}"
                run = write_run(directory, name, 1, loss, figures, model__logits=head, **values, **common)
                if (head, method, rate) == ("bfloat16", "adamw", RATES[-1]):
                    diverge(run)
        for core in ("adams", "muon"):
            values = METHODS["coupled"][0] | {"optimizer__core__name": core, "model__logits": "float32"}
            write_run(directory, f"{core}-{rate:g}", 1, 5.1 + 0.4 * above, None, **values, **common)


def diverge(run: Path) -> None:
    """Leave the run as if its loss had become infinite after the first evaluation."""
    for file in (run / "evaluation").iterdir():
        file.unlink()
    first = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
    (run / "metrics.jsonl").write_text(first)
    (run / DIVERGED).write_text(json.dumps({"reason": "step 3: loss inf, gradient norm inf"}))
