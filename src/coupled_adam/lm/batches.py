"""Token shards to batches. A batch depends on the seed and the step alone: a resumed run sees the same tokens."""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coupled_adam.errors import InputError
from coupled_adam.lm.corpus import Tokens
from coupled_adam.lm.masking import Masking

#: Tells the random numbers of the masks from those of the places.
MASKS = 1


class Batches:
    """Sequences of one length: without overlap, in an order that is drawn anew for every pass over the data.

    Or, with replacement: each begins at a token that is drawn at random, whatever was drawn before.
    """

    def __init__(
        self,
        shards: list[Tokens],
        sequence_length: int,
        batch_size: int,
        seed: int,
        vocab_size: int | None = None,
        replacement: bool = False,
        masking: Masking | None = None,
    ) -> None:
        """Raises InputError if the shards do not hold ``sequence_length`` + 1 tokens in a row."""
        self.vocab_size, self.replacement, self.masking = vocab_size, replacement, masking
        self.shards, self.sequence_length, self.batch_size, self.seed = shards, sequence_length, batch_size, seed
        per_shard = [(len(shard) - 1) // sequence_length for shard in shards]
        self._first_of_shard = np.cumsum([0, *per_shard])
        self._first_start = np.cumsum([0, *(max(len(shard) - sequence_length, 0) for shard in shards)])
        if len(self) < 1:
            raise InputError(
                f"{sum(map(len, shards)):,} tokens are too few for one sequence of {sequence_length} and its next token"
            )

    def __len__(self) -> int:
        """Count the sequences in one pass over the data."""
        return int(self._first_of_shard[-1])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of step 0, 1, …, int64 (batch_size, sequence_length); targets are one token ahead.

        With ``masking``, some inputs are masked, and the targets there are the tokens themselves.

        Raises:
            InputError: a token is not in the vocabulary, if that was given.
        """
        rows = np.stack([self._sequence(shard, start) for shard, start in self._places(step)])
        tokens = torch.from_numpy(rows.astype(np.int64))
        if self.masking is not None:
            return self.masking(tokens[:, :-1], [self.seed, step, MASKS])
        return tokens[:, :-1], tokens[:, 1:]

    def _places(self, step: int) -> list[tuple[int, int]]:
        """Return the shard of every sequence of a batch, and the position in it at which the sequence starts."""
        if self.replacement:
            starts = np.random.default_rng([self.seed, step]).integers(self._first_start[-1], size=self.batch_size)
            return [_split(start, self._first_start) for start in starts.tolist()]
        places, first = [], step * self.batch_size
        for i in range(first, first + self.batch_size):
            epoch, position = divmod(i, len(self))
            index = int(_permutation(len(self), self.seed, epoch)[position])
            shard, within = _split(index, self._first_of_shard)
            places.append((shard, within * self.sequence_length))
        return places

    def _sequence(self, shard: int, start: int) -> Tokens:
        sequence = self.shards[shard][start : start + self.sequence_length + 1]
        if self.vocab_size is not None and sequence.max() >= self.vocab_size:
            file = getattr(self.shards[shard], "filename", f"shard {shard}")
            raise InputError(
                f"{file}: token ID {sequence.max():,} after position {start:,}, but the vocabulary has "
                f"{self.vocab_size:,} tokens; the file is damaged or was made with another tokenizer: prepare the "
                "corpus again"
            )
        return sequence


def _split(index: int, firsts: NDArray[np.int64]) -> tuple[int, int]:
    """Return in which shard an index over all of them lies, and its index there."""
    shard = int(np.searchsorted(firsts, index, side="right")) - 1
    return shard, index - int(firsts[shard])


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(size)
