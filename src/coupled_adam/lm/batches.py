"""Token shards to batches. A batch depends on the seed and the step alone: a resumed run sees the same tokens."""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coupled_adam.errors import InputError
from coupled_adam.lm.corpus import Tokens


class Batches:
    """Sequences of one length, without overlap, in an order that is drawn anew for every pass over the data."""

    def __init__(
        self, shards: list[Tokens], sequence_length: int, batch_size: int, seed: int, vocab_size: int | None = None
    ) -> None:
        """Raises InputError if the shards do not hold ``sequence_length`` + 1 tokens in a row."""
        self.vocab_size = vocab_size
        self.shards, self.sequence_length, self.batch_size, self.seed = shards, sequence_length, batch_size, seed
        per_shard = [(len(shard) - 1) // sequence_length for shard in shards]
        self._first_of_shard = np.cumsum([0, *per_shard])
        if len(self) < 1:
            raise InputError(
                f"{sum(map(len, shards)):,} tokens hold no sequence of {sequence_length} and its next token"
            )

    def __len__(self) -> int:
        """Count the sequences in one pass over the data."""
        return int(self._first_of_shard[-1])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of step 0, 1, …, int64 (batch_size, sequence_length); targets are one token ahead.

        Raises:
            InputError: a token is not in the vocabulary, if that was given.
        """
        first = step * self.batch_size
        rows = np.stack([self._sequence(i) for i in range(first, first + self.batch_size)])
        tokens = torch.from_numpy(rows.astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]

    def _sequence(self, i: int) -> Tokens:
        epoch, position = divmod(i, len(self))
        index = int(_permutation(len(self), self.seed, epoch)[position])
        shard = int(np.searchsorted(self._first_of_shard, index, side="right")) - 1
        start = (index - int(self._first_of_shard[shard])) * self.sequence_length
        sequence = self.shards[shard][start : start + self.sequence_length + 1]
        if self.vocab_size is not None and sequence.max() >= self.vocab_size:
            file = getattr(self.shards[shard], "filename", f"shard {shard}")
            raise InputError(
                f"{file}: token {sequence.max():,} after position {start:,}, and the vocabulary has "
                f"{self.vocab_size:,}; the file is damaged or of another tokenizer: prepare the corpus again"
            )
        return sequence


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(size)
