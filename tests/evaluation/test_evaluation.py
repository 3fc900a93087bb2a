"""Figures of a trained model."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from coupled_adam import geometry
from coupled_adam.evaluation.embedding_figures import figures_while_training
from coupled_adam.evaluation.validation import batches_used, validate
from coupled_adam.figures import FIGURES
from coupled_adam.lm.batches import Batches
from coupled_adam.lm.config import Loss, Model
from coupled_adam.lm.model import build_model

BENCHMARK = geometry.Benchmark("small", tuple((f"w{i}", f"w{i + 1}", float(i % 5)) for i in range(15)))


def token_of(word: str) -> int | None:
    return int(word[1:]) if int(word[1:]) < 14 else None


def test_the_validation_loss_is_the_mean_over_all_tokens() -> None:
    model = build_model(Model(n_layers=1, n_heads=2, hidden_size=8), vocab_size=64, sequence_length=8, seed=0)
    tokens = np.random.default_rng(0).integers(64, size=8 * 6 + 1).astype(np.uint16)
    batches = Batches([tokens], sequence_length=8, batch_size=2, seed=0)
    inputs = torch.tensor(tokens[:-1].astype(np.int64)).view(6, 8)
    targets = torch.tensor(tokens[1:].astype(np.int64)).view(6, 8)
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item()
    assert validate(model, batches, 3)["validation_loss"] == pytest.approx(expected, rel=1e-5)
    assert validate(model, batches, 100)["validation_loss"] == pytest.approx(expected, rel=1e-5), (
        "one pass is all there is"
    )
    assert validate(model, batches, 1)["validation_loss"] != pytest.approx(expected, rel=1e-5)


def test_batches_that_are_drawn_at_random_are_not_bounded_by_a_pass_over_the_text() -> None:
    model = build_model(Model(n_layers=1, n_heads=2, hidden_size=8), vocab_size=64, sequence_length=8, seed=0)
    tokens = np.random.default_rng(0).integers(64, size=8 * 6 + 1).astype(np.uint16)
    batches = Batches([tokens], sequence_length=8, batch_size=2, seed=0, replacement=True)
    assert batches_used(batches, 100) == 100
    losses = [F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item() for x, y in map(batches.batch, range(10))]
    assert validate(model, batches, 10)["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_validation_loss_in_bfloat16_is_that_of_autocast() -> None:
    model = build_model(Model(n_layers=1, n_heads=2, hidden_size=8), vocab_size=64, sequence_length=8, seed=0)
    tokens = np.random.default_rng(0).integers(64, size=8 * 6 + 1).astype(np.uint16)
    batches = Batches([tokens], sequence_length=8, batch_size=6, seed=0)
    inputs, targets = batches.batch(0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(inputs).float().flatten(0, 1)
    found = validate(model, batches, 1, precision="bfloat16")
    assert found["validation_loss"] == pytest.approx(F.cross_entropy(logits, targets.flatten()).item(), rel=1e-6)
    assert found["validation_loss"] != validate(model, batches, 1)["validation_loss"]


def test_a_capped_and_rounded_model_is_measured_as_it_predicts_and_without_penalties() -> None:
    config = Model(n_layers=1, n_heads=2, hidden_size=8, logits="bfloat16")
    model = build_model(config, 64, 8, seed=0, loss=Loss(z_loss=1.0, mu_loss=10.0, softcap=0.1))
    tokens = np.random.default_rng(0).integers(64, size=8 * 6 + 1).astype(np.uint16)
    found = validate(model, Batches([tokens], sequence_length=8, batch_size=2, seed=0), 3)
    logits = model(torch.tensor(tokens[:-1].astype(np.int64)).view(6, 8)).flatten(0, 1).detach()
    expected = {
        "validation_loss": F.cross_entropy(logits, torch.tensor(tokens[1:].astype(np.int64))),
        "logit_mean": logits.mean(1).mean(),
        "logit_std": logits.std(1, correction=0).mean(),
        "logit_max": logits.abs().amax(1).mean(),
        "log_z_squared": logits.logsumexp(1).square().mean(),
    }
    assert found == {name: pytest.approx(value.item(), rel=1e-5, abs=1e-7) for name, value in expected.items()}
    assert set(found) <= set(FIGURES)
    assert 0.05 < found["logit_max"] < 0.1


def test_the_figures_are_those_of_the_metrics() -> None:
    embedding = np.random.default_rng(1).standard_normal((16, 4)) + 1
    counts = np.arange(1, 17)
    figures = figures_while_training(embedding, counts, token_of, [BENCHMARK])
    assert figures["norm_frequency_spearman"] == geometry.norm_frequency_correlation(embedding, counts).spearman
    assert figures["word_similarity"] == geometry.word_similarity(embedding, token_of, BENCHMARK).cosine
    assert figures["word_similarity_pairs"] == 13


def test_what_is_not_defined_is_none() -> None:
    figures = figures_while_training(np.ones((16, 4)), np.ones(16), lambda word: None, [BENCHMARK])
    undefined = {name for name, value in figures.items() if value is None}
    assert undefined == {"norm_frequency_pearson", "norm_frequency_spearman", "word_similarity"}
    assert not any(math.isnan(value) for value in figures.values() if value is not None)
