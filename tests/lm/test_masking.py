"""Masked language models: what they see and predict, how they learn from it, and what is measured of them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from coupled_adam.cli import app
from coupled_adam.errors import InputError
from coupled_adam.evaluation.by_frequency import by_frequency
from coupled_adam.evaluation.stages import Downstream, evaluate
from coupled_adam.evaluation.validation import held_out, validate
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.estimate import flops_per_token
from coupled_adam.lm.masking import IGNORED, Masking, masking_of
from coupled_adam.lm.model import LanguageModel, build_model, parameter_count
from coupled_adam.lm.parallel import World
from coupled_adam.lm.prepare import prepare, resolved
from coupled_adam.lm.run import open_run
from coupled_adam.lm.sources import TextFiles
from coupled_adam.lm.train import backward, train


@pytest.fixture
def masked(tiny: Experiment) -> Experiment:
    return tiny.with_values(model__family="modernbert", train__masked=0.25)


def test_shares_are_those_of_bert_and_all_else_is_left_alone() -> None:
    tokens = torch.randint(1000, (500, 128), generator=torch.Generator().manual_seed(0))
    seen, targets = Masking(predicted=19, mask_token=1000)(tokens, [1, 2])
    wanted = targets != IGNORED
    assert (wanted.sum(1) == 19).all(), "as many in each sequence"
    assert torch.equal(targets[wanted], tokens[wanted]) and torch.equal(seen[~wanted], tokens[~wanted])
    total = int(wanted.sum())
    replaced, kept = int((seen == 1000).sum()), int((seen[wanted] == tokens[wanted]).sum())
    for count, share in ((replaced, 0.8), (kept, 0.1 + 0.1 / 1000), (total - replaced - kept, 0.1 * 0.999)):
        assert abs(count - share * total) < 4 * math.sqrt(total * share * (1 - share)), "binomial"
    assert seen.max() == 1000 and seen.min() >= 0
    by_position = wanted.sum(0).double()
    assert ((by_position - 500 * 19 / 128).abs() < 5 * math.sqrt(500 * 0.15 * 0.85)).all(), "every position alike"


def test_masks_depend_on_seed_and_step_alone(masked: Experiment, text_file: Path, tmp_path: Path) -> None:
    corpus = prepare(TextFiles(text_file), masked.data, tmp_path / "corpus")
    one, two = held_out(masked, corpus), held_out(masked, corpus)
    for step in (2, 0, 1):
        one.batch(step)
    assert all(torch.equal(a, b) for a, b in zip(one.batch(1), two.batch(1), strict=True))
    masking = masking_of(masked, corpus)
    assert (
        masking == Masking(4, 300)
        and masking_of(masked.with_values(model__family="llama", train__masked=0.15), corpus) is None
    )
    tokens = torch.zeros(4, 16, dtype=torch.int64)
    assert torch.equal(masking(tokens, [1, 2])[0], masking(tokens, [1, 2])[0])
    assert not torch.equal(masking(tokens, [1, 2])[0], masking(tokens, [1, 3])[0])


def test_only_masked_tokens_count(masked: Experiment) -> None:
    """The loss of a batch is the mean over its targets, in any number of parts, and as torch computes it."""
    model = build_model(masked.model, 320, 16, seed=1)
    tokens = torch.randint(300, (8, 16), generator=torch.Generator().manual_seed(0))
    batch = Masking(4, 300)(tokens, [0])
    expected = torch.nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    for micro in (8, 2):
        model.zero_grad()
        loss, penalty = backward(model, batch, micro, "float32", World()).tolist()
        assert loss == pytest.approx(float(expected.detach()), rel=1e-6) and penalty == 0
        for found, grad in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(found.grad, grad, rtol=1e-4, atol=1e-7)


def test_validation_is_the_mean_over_the_targets(masked: Experiment, text_file: Path, tmp_path: Path) -> None:
    corpus = prepare(TextFiles(text_file), masked.data, tmp_path / "corpus")
    model, batches = build_model(masked.model, corpus.vocab_size, 16, seed=1), held_out(masked, corpus)
    with torch.no_grad():
        parts = [(model(seen), there) for seen, there in (batches.batch(i) for i in range(2))]
    logits, targets = (torch.cat(each).flatten(0, 1) for each in zip(*parts, strict=True))
    expected = torch.nn.functional.cross_entropy(logits, targets)
    assert validate(model, batches, 2)["validation_loss"] == pytest.approx(float(expected), rel=1e-6)


def test_a_full_vocabulary_has_no_mask_token(masked: Experiment, text_file: Path, tmp_path: Path) -> None:
    corpus = prepare(TextFiles(text_file), masked.data.model_copy(update={"vocab_size": 320}), tmp_path / "corpus")
    with pytest.raises(InputError, match=r"320 tokens are a multiple of 64, .*a vocabulary of 319"):
        masking_of(masked, corpus)
    with pytest.raises(InputError, match=r"data\.vocab_size 320 is a multiple of 64"):
        resolved(masked, corpus)


class Oracle(LanguageModel):
    """Predicts a text whose token i is i modulo a prime: the neighbours of a masked token tell it."""

    def forward(self, tokens, targets=None):
        prime, length = 251, tokens.shape[1]
        first = (tokens - torch.arange(length)) % prime
        start = first.mode(1, keepdim=True).values  # most of the tokens are as they were
        right = (start + torch.arange(length)) % prime
        return 30.0 * torch.nn.functional.one_hot(right, 320).float()


def test_losses_by_frequency_are_of_the_masked_tokens(masked: Experiment, text_file: Path, tmp_path: Path) -> None:
    corpus = prepare(TextFiles(text_file), masked.data, tmp_path / "corpus")
    text = (np.arange(2000) % 251).astype("uint16")
    end = np.flatnonzero(text == 250)
    corpus.meta["end_of_document"] = 250
    object.__setattr__(corpus, "shards", lambda split: [text])
    experiment = masked.with_values(evaluation__final_batches=8, train__batch_tokens=256)
    found = by_frequency(Oracle(experiment.model, 320, 16), experiment, corpus)
    assert found["loss_selection"] < 1e-6 and found["loss_report"] < 1e-6, "a target one ahead would cost 30 nats"
    assert "bits_per_byte" not in found
    draws, shown = 4, 124 * 16
    assert abs(found["tokens_report"] - draws * 0.25 * shown / 2) < 0.2 * shown and len(end) == 7
    assert len(found["documents"]["loss"]) == 4


@pytest.mark.long
def test_a_run_learns_resumes_and_is_evaluated(masked: Experiment, text_file: Path, tmp_path: Path, capsys) -> None:
    experiment = masked.with_values(train__steps=40, schedule__lr=1e-2, optimizer__embedding__lr_factor=3.0)
    corpus = prepare(TextFiles(text_file), masked.data, tmp_path / "corpus")
    batches, losses = held_out(experiment, corpus), []

    def measure(model: LanguageModel, last: bool) -> dict[str, float]:
        losses.append(validate(model, batches, 4)["validation_loss"])
        if len(losses) == 3:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        train(experiment, corpus, tmp_path / "run", measure)
    train(experiment, corpus, tmp_path / "run", lambda model, last: {})
    whole = train(experiment, corpus, tmp_path / "whole", lambda model, last: {})
    resumed = open_run(tmp_path / "run")
    for found, expected in zip(resumed.model().parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert validate(whole, batches, 4)["validation_loss"] < losses[0] - 0.5
    found = evaluate(tmp_path / "run", tasks=Downstream(("arc_easy",)))
    assert found["validation"]["tokens"] == 2 * 4 * 4, "targets alone"
    assert "is a masked language model" in found["downstream"]["failed"]["downstream"]
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["architectures"] == ["ModernBertForMaskedLM"]
    app(["audit", str(tmp_path / "run" / "model")], standalone_mode=False)
    assert "Tied models" in capsys.readouterr().out


def test_the_head_costs_only_what_it_computes(masked: Experiment) -> None:
    parameters = parameter_count(build_model(masked.model, 320, 16, seed=1))
    inside, head = parameters - 320 * 16, 320 * 16
    assert flops_per_token(masked, parameters) == pytest.approx(6 * (inside + head / 4) + 12 * 2 * 16 * 16)
