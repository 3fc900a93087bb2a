"""Loss by frequency, and what is predicted of rare tokens, against a computation token by token."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from coupled_adam.errors import InputError
from coupled_adam.evaluation.by_frequency import KAPPA_BOUNDS, by_frequency, kappa
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.corpus import Corpus
from coupled_adam.lm.model import build_model
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.sources import TextFiles


@pytest.fixture
def corpus(text_file: Path, tiny: Experiment, tmp_path: Path) -> Corpus:
    return prepare(TextFiles(text_file), tiny.data, tmp_path / "corpus")


def test_it_is_what_the_tokens_say_one_by_one(tiny: Experiment, corpus: Corpus) -> None:
    experiment = tiny.with_values(evaluation__final_batches=10_000)
    model = build_model(experiment.model, corpus.vocab_size, 16, seed=0).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)  # predictions that differ
    found = by_frequency(model, experiment, corpus)
    text, counts = np.concatenate(corpus.shards("validation")).astype(int), corpus.unigram_counts
    losses, rows, predicted = {0: [], 1: []}, [], np.zeros(corpus.vocab_size)
    for i in range((len(text) - 1) // 16 * 16):
        half = np.count_nonzero(text[: i + 1] == corpus.meta["end_of_document"]) % 2  # of the document of token i + 1
        p = torch.softmax(model(torch.tensor(text[i // 16 * 16 : i + 1])[None])[0, -1].double(), -1).detach()
        losses[half].append(-p[text[i + 1]].log().item())
        if half:
            rows.append(text[i + 1])
            predicted += p.numpy()
    assert found["loss_selection"] == pytest.approx(np.mean(losses[0]), rel=1e-4)
    assert found["loss_report"] == pytest.approx(np.mean(losses[1]), rel=1e-4)
    found_documents = found["documents"]
    assert sum(found_documents["tokens"]) == len(losses[1])
    assert np.dot(found_documents["tokens"], found_documents["loss"]) == pytest.approx(sum(losses[1]), rel=1e-4)
    ends = np.flatnonzero(text == corpus.meta["end_of_document"])
    second = losses[1][: ends[1] - ends[0]]  # document 1 begins after the first end
    assert found_documents["tokens"][0] == len(second)
    assert found_documents["loss"][0] == pytest.approx(np.mean(second), abs=1e-4)
    length = len(corpus.tokenizer.decode([int(row) for row in rows]).encode())
    assert found["bits_per_byte"] == pytest.approx(sum(losses[1]) / np.log(2) / length, rel=1e-4)
    order = np.argsort(counts[rows], kind="stable")
    deciles = [np.mean(np.array(losses[1])[part]) for part in np.array_split(order, 10)]
    assert found["loss_by_decile"] == pytest.approx(deciles, rel=1e-4)
    values = kappa(counts, 0.95, 64)
    rare = values < KAPPA_BOUNDS[0]
    share, part = counts / counts.sum(), found["kappa"]["below_0.1"]
    assert rare.sum() > 10
    assert part["predicted"] == pytest.approx(predicted[rare].sum() / len(rows), rel=1e-4)
    assert part["log_ratio"] == pytest.approx(np.log(predicted[rare] / len(rows) / share[rare]).mean(), rel=1e-4)
    for name in ("text", "held_out", "predicted"):
        assert sum(range_[name] for range_ in found["kappa"].values()) == pytest.approx(1)


def test_kappa_is_one_where_a_token_comes_as_often_as_it_is_forgotten() -> None:
    counts = np.array([1, 20, 979, 0])
    np.testing.assert_allclose(kappa(counts, 0.95, 50)[:2], [1.0, 0.05])
    assert np.isinf(kappa(counts, 0.95, 50)[3])


def test_one_document_has_no_two_halves(tiny: Experiment, corpus: Corpus) -> None:
    one = dataclasses.replace(corpus, meta={**corpus.meta, "end_of_document": corpus.vocab_size})
    model = build_model(tiny.model, corpus.vocab_size, 16, seed=0)
    with pytest.raises(InputError, match="one document"):
        by_frequency(model, tiny, one)
