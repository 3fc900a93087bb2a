"""Fine-tune pretrained models with AdamW and with Coupled Adam, each at its own learning rate, into a CSV file.

    coupled-adam reproduce mini --only rates --out runs/mini
    coupled-adam prepare wikipedia-leads --tokenizer runs/mini/corpus/wikipedia-sample-bpe-8192 --out data/leads
    python tools/finetuning.py runs/mini/mini-rates-adamw-x30-s[123] --data data/leads --out docs/results/finetuning.csv

Each run is a pretrained model, with the tokenizer of the text to fine-tune on. Both optimizers start without moments,
from the same weights and on the same batches: 96 steps of 1,024 tokens, warm-up 10, cosine to a tenth, decay 0.1.
The first run looks for the rates, downhill over half decades, by the loss on half of the new held-out text: first one
rate for all parameters, then a factor on it for the embedding alone. The other runs are fine-tuned at those. Losses to
compare are of the other half. Lines that FILE has already are not measured again. Takes about ten minutes on one core.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from short_runs import Line, Table, batches_of, loss_of, optimizer_of, train

from coupled_adam import geometry
from coupled_adam.lm.corpus import Corpus, open_corpus
from coupled_adam.lm.run import Run, open_run

STEPS, WARMUP, SEQUENCES, EVALUATED = 96, 10, 8, 20
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
OPTIMIZERS = ("adamw", "coupled_adam")


def measure(run: Run, corpus: Corpus, optimizer: str, lr: float, factor: float) -> Line:
    """Fine-tune one pretrained model, and measure it; without ``optimizer``, as it is."""
    length, seed, model = run.experiment.data.sequence_length, run.experiment.run.seed, run.model()
    if optimizer:
        batches = batches_of(corpus, "train", length, SEQUENCES, seed)
        train(model, batches, optimizer_of(optimizer, model, lr, factor, 0.1), STEPS, WARMUP)
    new, old = (batches_of(each, "validation", length, SEQUENCES, 0) for each in (corpus, run.corpus))
    embedding = model.get_output_embeddings().weight.detach()
    return {
        "seed": seed,
        "steps": STEPS if optimizer else 0,
        "batch_tokens": SEQUENCES * length,
        "loss_selection": loss_of(model, new, range(0, EVALUATED, 2)),
        "loss_report": loss_of(model, new, range(1, EVALUATED, 2)),
        "loss_old": loss_of(model, old, range(0, EVALUATED, 2)),
        "mean_shift_ratio": geometry.mean_shift_ratio(embedding),
        "norm_of_mean": geometry.norm_of_mean(embedding),
        "isotropy": geometry.isotropy(embedding),
    }


def downhill(values: Sequence[float], start: float, loss: Callable[[float], float]) -> float:
    """Return the value whose neighbors have higher losses, or the last one of all."""
    at = values.index(start)
    while True:
        around = [i for i in (at - 1, at, at + 1) if 0 <= i < len(values)]
        best = min(around, key=lambda i: loss(values[i]))
        if best == at:
            return values[at]
        at = best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="pretrained models, one per seed")
    parser.add_argument("--data", type=Path, required=True, help="the text to fine-tune on, by `coupled-adam prepare`")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the table, which is added to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs, corpus = [open_run(path) for path in options.runs], open_corpus(options.data)
    if any(run.corpus.tokenizer.to_str() != corpus.tokenizer.to_str() for run in runs):
        sys.exit(f"{options.data}: has another tokenizer than the runs; prepare it with --tokenizer of their corpus")
    table = Table(options.out, ("pretrained", "optimizer", "lr", "lr_factor"))

    def loss(run: Run, optimizer: str, lr: float, factor: float) -> float:
        at = (optimizer, lr, factor)
        return float(table.line(run.directory.name, *at, measure=partial(measure, run, corpus, *at))["loss_selection"])

    for run in runs:
        loss(run, "", 0.0, 0.0)
    for name in OPTIMIZERS:
        lr = downhill(RATES, 1e-3, partial(loss, runs[0], name, factor=1.0))
        factor = downhill(FACTORS, 1.0, partial(loss, runs[0], name, lr))
        for run in runs[1:]:
            for chosen in sorted({1.0, factor}):
                loss(run, name, lr, chosen)


if __name__ == "__main__":
    main()
