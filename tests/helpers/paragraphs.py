"""Made-up text."""

import random

WORDS = "the of a river lake mountain sun moon king queen dog cat house street walked saw and over under quickly slowly"


def paragraphs(count: int, seed: int = 0) -> str:
    """Paragraphs of made-up sentences, separated by blank lines."""
    rng, words = random.Random(seed), WORDS.split()
    return "\n\n".join(" ".join(rng.choices(words, k=40)) + "." for _ in range(count))
