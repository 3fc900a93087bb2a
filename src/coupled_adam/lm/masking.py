"""Tokens of a masked language model: which ones it is to predict, and what it sees in their place."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coupled_adam.errors import InputError
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.corpus import Corpus

#: The target where nothing is to be predicted, as in torch's cross entropy.
IGNORED = -100

#: Shares of the tokens to predict that are masked, and that are replaced by a random token (Devlin et al., BERT,
#: arXiv 1810.04805, section 3.1).
MASKED, RANDOM = 0.8, 0.1


@dataclass(frozen=True)
class Masking:
    """How sequences are masked."""

    predicted: int
    """Tokens of a sequence that are to be predicted."""
    mask_token: int
    """ID of the mask token; the IDs below it are those of the tokenizer."""

    def __call__(self, tokens: Tensor, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of sequences, int64 (batch, sequence) each; the same for the same ``seed``.

        Every token is as likely as any other to be one that is to be predicted, also the end of a document.
        """
        rng = np.random.default_rng(seed)
        chosen = torch.from_numpy(rng.random(tokens.shape).argpartition(self.predicted - 1)[:, : self.predicted])
        there = tokens.gather(1, chosen)
        draw, other = rng.random(chosen.shape), rng.integers(self.mask_token, size=chosen.shape)
        seen = torch.where(torch.from_numpy(draw < MASKED + RANDOM), torch.from_numpy(other), there)
        seen = torch.where(torch.from_numpy(draw < MASKED), self.mask_token, seen)
        return tokens.scatter(1, chosen, seen), torch.full_like(tokens, IGNORED).scatter(1, chosen, there)


def mask_token(corpus: Corpus) -> int:
    """Return the ID of the mask token: the first row of the embedding that is of no token of the tokenizer.

    Raises:
        InputError: there is no such row.
    """
    tokens = corpus.meta["tokenizer_tokens"]
    if tokens == corpus.vocab_size:
        raise InputError(
            f"{corpus.directory}: its {tokens:,} tokens are a multiple of 64, so the embedding has no row for the mask "
            f"token; prepare it with a vocabulary of {tokens - 1:,}"
        )
    return tokens


def masking_of(experiment: Experiment, corpus: Corpus) -> Masking | None:
    """Return how the sequences of a run are masked; None if its model predicts the next token.

    Raises:
        InputError: the corpus leaves no row of the embedding for the mask token.
    """
    if not experiment.model.masked:
        return None
    return Masking(experiment.masked_tokens, mask_token(corpus))
