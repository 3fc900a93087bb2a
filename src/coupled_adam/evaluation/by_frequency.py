"""How well a model predicts rare and frequent tokens, on two halves of the held-out text.

A learning rate is chosen on one half, and what is reported is measured on the other: documents alternate between them.
"""

import itertools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coupled_adam.errors import InputError
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.corpus import Corpus
from coupled_adam.lm.masking import IGNORED, masking_of
from coupled_adam.lm.model import LanguageModel
from coupled_adam.progress import progress_bar

#: Bounds of κ = (1 − β2) / (q·B) between which rows are gathered. A token of share q occurs every 1/(q·B) steps of B
#: tokens; where κ > 1 its second moment is forgotten in between (arXiv 2609.37535).
KAPPA_BOUNDS = (0.1, 1.0, 10.0)

#: Names of the rows between the bounds.
KAPPA_NAMES = ("below_0.1", "0.1_to_1", "1_to_10", "above_10")

#: Positions whose logits exist at a time.
POSITIONS = 1024

#: Parts of equal length of the held-out text, by the frequency of its tokens in training.
DECILES = 10


@torch.no_grad()
def by_frequency(model: LanguageModel, experiment: Experiment, corpus: Corpus) -> dict[str, Any]:
    """Measure held-out text in its order: as much as the last evaluation of the training takes.

    A masked language model sees it several times, with other masks: about as often as each token is predicted once.

    Args:
        model: on one process, in evaluation mode.
        experiment, corpus: of its run.

    Returns:
        ``loss_selection`` and ``loss_report``: mean cross entropy in nats of documents 0, 2, 4, … and 1, 3, 5, ….
        ``bits_per_byte``: of the report half, which compares across tokenizers; not of a masked language model.
        ``documents``: ``tokens`` and mean ``loss`` of each document of the report half, to four digits.
        ``loss_by_decile``: that of the report half, from its rarest tenth to its most frequent.
        ``kappa``: by range of κ the share of the vocabulary's tokens and of the training text (``rows``, ``text``), the
        share of the report half (``held_out``) and of the predicted probability (``predicted``), and the mean of
        log(p̄/q) over the rows, p̄ being the mean predicted probability and q the share of the training text
        (``log_ratio``); ``unseen``: rows that do not occur in training, without κ.
    """
    losses, targets, documents, predicted = _predictions(model, experiment, corpus)
    counts = corpus.unigram_counts
    report = documents % 2 == 1
    if report.all() or not report.any():
        raise InputError(f"{corpus.directory}: its validation text is one document, and two are compared")
    found: dict[str, Any] = {
        "loss_selection": float(losses[~report].mean()),
        "loss_report": float(losses[report].mean()),
        "tokens_report": int(report.sum()),
        "documents": _by_document(losses[report], documents[report]),
    }
    if not experiment.model.masked:
        found["bits_per_byte"] = float(losses[report].sum() / math.log(2)) / _bytes(corpus, targets[report])
    order = np.argsort(counts[targets[report]], kind="stable")
    found["loss_by_decile"] = [float(part.mean()) for part in np.array_split(losses[report][order], DECILES)]
    found["kappa"] = _kappa(experiment, corpus, targets[report], predicted)
    return found


def _bytes(corpus: Corpus, tokens: NDArray[np.int64]) -> int:
    """Count the bytes of the text that the tokens stand for."""
    return len(corpus.tokenizer.decode(tokens.tolist(), skip_special_tokens=True).encode())


def _by_document(losses: NDArray[np.float64], documents: NDArray[np.int64]) -> dict[str, list[Any]]:
    _, place = np.unique(documents, return_inverse=True)
    tokens = np.bincount(place)
    means = np.bincount(place, losses) / tokens
    return {"tokens": tokens.tolist(), "loss": [round(float(mean), 4) for mean in means]}


def kappa(counts: NDArray[np.int64], beta2: float, batch_tokens: int) -> NDArray[np.float64]:
    """Return κ = (1 − β2) / (q·B) of every row, (V,): infinite for rows that do not occur."""
    share = counts / counts.sum()
    with np.errstate(divide="ignore"):
        return np.asarray((1 - beta2) / (share * batch_tokens))


def _kappa(
    experiment: Experiment, corpus: Corpus, targets: NDArray[np.int64], predicted: NDArray[np.float64]
) -> dict[str, dict[str, float | None]]:
    counts = corpus.unigram_counts
    values = kappa(counts, experiment.optimizer.embedding_beta2, experiment.train.batch_tokens)
    share = counts / counts.sum()
    held_out = np.bincount(targets, minlength=len(counts)) / len(targets)
    tokens = int(corpus.meta["tokenizer_tokens"])
    known = np.arange(len(counts)) < tokens  # the rest pads the matrix
    place = np.digitize(values, KAPPA_BOUNDS)
    parts = {name: known & (counts > 0) & (place == i) for i, name in enumerate(KAPPA_NAMES)}
    parts |= {"unseen": known & (counts == 0), "padding": ~known}
    found: dict[str, dict[str, float | None]] = {}
    for name, rows in parts.items():
        ratio = None
        if rows.any() and (counts[rows] > 0).all():
            ratio = float(np.log(np.maximum(predicted[rows], 1e-30) / share[rows]).mean())
        found[name] = {
            "rows": float(rows.sum() / tokens),
            "text": float(share[rows].sum()),
            "held_out": float(held_out[rows].sum()),
            "predicted": float(predicted[rows].sum()),
            "log_ratio": ratio,
        }
    return found


def _predictions(
    model: LanguageModel, experiment: Experiment, corpus: Corpus
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return losses, targets and documents of what is predicted, (N,), and of the report half the mean of p, (V,)."""
    text = np.concatenate([np.asarray(shard, dtype=np.int64) for shard in corpus.shards("validation")])
    length = experiment.data.sequence_length
    settings, masking = experiment.evaluation, masking_of(experiment, corpus)
    batches = settings.final_batches or settings.batches
    count = min((len(text) - 1) // length, batches * experiment.batch_size)
    ahead, draws = (1, 1) if masking is None else (0, round(length / masking.predicted))
    # Documents begin after the end of the one before; the target at position i is token i + 1, or the masked token i.
    document = np.concatenate([[0], np.cumsum(text == corpus.meta["end_of_document"])[:-1]])
    inputs, targets, documents = (
        torch.from_numpy(values[start : start + count * length].reshape(count, length))
        for values, start in ((text, 0), (text, ahead), (document, ahead))
    )
    device = next(model.parameters()).device
    losses, wanted, of_document = list[Tensor](), list[Tensor](), list[Tensor]()
    predicted, reported = torch.zeros(corpus.vocab_size, dtype=torch.float64), 0
    at_a_time = max(POSITIONS // length, 1)
    with progress_bar(experiment.run.name, 0, draws * count, unit="sequence", passing=True) as show:
        for draw, i in itertools.product(range(draws), range(0, count, at_a_time)):
            part = slice(i, i + at_a_time)
            seen, there = (inputs[part], targets[part]) if masking is None else masking(inputs[part], [draw, i])
            known = there != IGNORED
            logits = model(seen.to(device))
            logits = logits.flatten(0, 1) if masking is None else logits[known.to(device)]
            log_p = torch.log_softmax(logits.float(), -1)
            wanted.append(there[known])
            of_document.append(documents[part][known])
            losses.append(-log_p.gather(1, wanted[-1].to(device)[:, None]).squeeze(1).cpu())
            kept = of_document[-1] % 2 == 1
            predicted += log_p[kept.to(device)].exp_().sum(0).double().cpu()
            reported += int(kept.sum())
            show(draw * count + min(i + at_a_time, count), "loss by frequency")
    found = torch.cat(losses).double().numpy()
    if not math.isfinite(float(found.sum())):
        raise ValueError("a loss on the held-out text is not finite")
    return found, torch.cat(wanted).numpy(), torch.cat(of_document).numpy(), predicted.numpy() / max(reported, 1)
