"""Train small models with the first moment of the embedding in float32, bfloat16 and eight bits, into a CSV file.

    coupled-adam prepare wikipedia-leads --out data/leads
    python tools/first_moments.py --data data/leads --out docs/results/first-moments.csv

Tied GPT-2s of two layers and width 64, 300 steps of 1,024 tokens with Coupled Adam at 3e-3, three times that for the
embedding, warm-up 30, cosine to a tenth. Three seeds; one seed begins with the same weights and sees the same batches.
Lines that FILE has already are not measured again. Takes three minutes on one core.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from short_runs import Line, Table, batches_of, loss_of, optimizer_of, train

from coupled_adam import geometry
from coupled_adam.lm.config import Model
from coupled_adam.lm.corpus import Corpus, open_corpus
from coupled_adam.lm.model import build_model
from coupled_adam.optim.typed import MomentDtype

MODEL = Model(family="gpt2", n_layers=2, n_heads=2, hidden_size=64, qk_norm=True)
DTYPES: dict[str, MomentDtype] = {"float32": None, "bfloat16": torch.bfloat16, "8bit": "8bit"}
LENGTH, SEQUENCES, STEPS, WARMUP, EVALUATED = 128, 8, 300, 30, 40


def measure(corpus: Corpus, dtype: MomentDtype, seed: int) -> Line:
    """Train one model, and measure it."""
    model = build_model(MODEL, corpus.vocab_size, LENGTH, seed)
    optimizer = optimizer_of("coupled_adam", model, 3e-3, 3.0, 0.0, dtype)
    train(model, batches_of(corpus, "train", LENGTH, SEQUENCES, seed), optimizer, STEPS, WARMUP)
    held_out = batches_of(corpus, "validation", LENGTH, SEQUENCES, 0)
    return {
        "loss": loss_of(model, held_out, range(EVALUATED)),
        "mean_shift_ratio": geometry.mean_shift_ratio(model.get_output_embeddings().weight.detach()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the text, by `coupled-adam prepare`")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the table, which is added to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    corpus, table = open_corpus(options.data), Table(options.out, ("exp_avg_dtype", "seed"))
    for seed in (1, 2, 3):
        for name, dtype in DTYPES.items():
            table.line(name, seed, measure=partial(measure, corpus, dtype, seed))


if __name__ == "__main__":
    main()
