"""Train a small language model in JAX with Coupled Adam, then with AdamW, and compare loss and mean embedding.

    pip install ".[jax]"                              # in a clone of the repository
    python examples/optax_training.py                 # on the words of Python's own documentation, half a minute
    python examples/optax_training.py my-text.txt     # or on yours

The model predicts a word from the three before it. Its embedding is tied: the input, and the head.
"""

import pydoc_data.topics
import re
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from coupled_adam.optax import coupled_adam

VOCABULARY, WIDTH, CONTEXT, BATCH, STEPS = 2048, 64, 3, 256, 400


def text_of(arguments: list[str]) -> str:
    if arguments:
        return Path(arguments[0]).read_text("utf-8")
    return " ".join(map(str, pydoc_data.topics.topics.values()))


def tokens_of(text: str) -> np.ndarray:
    """Number the words by frequency; 0 is every rarer word."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    ids = {word: i for i, (word, _) in enumerate(Counter(words).most_common(VOCABULARY - 1), start=1)}
    found = np.array([ids.get(word, 0) for word in words])
    if len(found) <= CONTEXT + BATCH:
        sys.exit(f"optax_training.py: only {len(found)} words of text; pass a file with more")
    return found


def initial(key: jax.Array) -> dict[str, jax.Array]:
    embedding, hidden = jax.random.split(key)
    return {
        "embedding": 0.02 * jax.random.normal(embedding, (VOCABULARY, WIDTH)),
        "hidden": jax.random.normal(hidden, (CONTEXT * WIDTH, WIDTH)) / (CONTEXT * WIDTH) ** 0.5,
    }


def loss_of(params: dict[str, jax.Array], words: jax.Array) -> jax.Array:
    """Mean cross entropy of the last of CONTEXT + 1 words; ``words``: (B, CONTEXT + 1)."""
    x = params["embedding"][words[:, :CONTEXT]].reshape(len(words), -1)
    x = x / (jnp.sqrt((x * x).mean(-1, keepdims=True)) + 1e-6)
    logits = jnp.tanh(x @ params["hidden"]) @ params["embedding"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, words[:, CONTEXT]).mean()


def train(optimizer: optax.GradientTransformation, tokens: np.ndarray) -> tuple[float, float]:
    """Return the loss over the last tenth of the steps, and ‖μ‖ over the mean norm of the embeddings."""
    params = initial(jax.random.key(0))
    state, draw, losses = optimizer.init(params), np.random.default_rng(0), []

    @jax.jit
    def step(params, state, words):
        loss, grads = jax.value_and_grad(loss_of)(params, words)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(STEPS):
        first = draw.integers(len(tokens) - CONTEXT, size=(BATCH, 1))
        params, state, loss = step(params, state, tokens[first + np.arange(CONTEXT + 1)])
        losses.append(float(loss))
    embedding = params["embedding"]
    shift = jnp.linalg.norm(embedding.mean(0)) / jnp.linalg.norm(embedding, axis=1).mean()
    return float(np.mean(losses[-STEPS // 10 :])), float(shift)


def main() -> None:
    tokens = tokens_of(text_of(sys.argv[1:]))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, STEPS // 10, STEPS)
    optimizers = {
        "Coupled Adam": coupled_adam(schedule, 0.9, 0.95, coupled={"embedding": True, "hidden": False}),
        "AdamW": optax.adamw(schedule, 0.9, 0.95, weight_decay=0.0),
    }
    for name, optimizer in optimizers.items():
        loss, shift = train(optax.chain(optax.clip_by_global_norm(1.0), optimizer), tokens)
        print(f"{name:<12}  loss {loss:.3f}  mean shift ratio {shift:.3f}", flush=True)


if __name__ == "__main__":
    main()
