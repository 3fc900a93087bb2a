"""A run to a Hugging Face directory that transformers loads without this package.

GPT-2 is a GPT2LMHeadModel, with zeros for the biases that ours does not have; LLaMA a LlamaForCausalLM, with normalized
queries and keys a Qwen3ForCausalLM, with a soft-cap a VaultGemmaForCausalLM; ModernBERT a ModernBertForMaskedLM. The
embeddings are stored as they are.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coupled_adam.errors import InputError, require
from coupled_adam.files import (
    MANIFEST,
    check_replaceable,
    check_writable,
    is_whole,
    read_json,
    update_file,
    write_json,
    written_whole,
)
from coupled_adam.lm.config import Experiment, Model
from coupled_adam.lm.corpus import Corpus
from coupled_adam.lm.masking import mask_token
from coupled_adam.lm.model import RMS_EPS, ROTARY_BASE
from coupled_adam.lm.run import Run

#: Key of config.json, which transformers passes over: what the directory was made of.
ORIGIN = "coupled_adam"

#: Epsilon of the LayerNorm of torch, and so of ours.
LAYER_NORM_EPS = 1e-5

#: The text of the mask token.
MASK = "[MASK]"

#: What such a directory is said to be, where it would be replaced.
KIND = "model"

#: The model card, which a user may change.
CARD = "README.md"


def export(run: Run, weights: dict[str, Tensor], digest: str, directory: Path) -> None:
    """Write model, tokenizer, configuration and model card of ``run`` to ``directory``, whole or not at all.

    An export of the same ``digest`` (of ``weights``, all of them by our names, on the CPU) is left as it is.

    Raises:
        InputError: an architecture that transformers does not provide, or something else in ``directory``.
    """
    require("demo", "transformers")
    config = transformers_config(run.experiment, run.corpus)
    config[ORIGIN] = {"run": run.experiment.run.name, "step": run.step, "weights_sha256": digest}
    check_target(directory, digest)
    if _holds(directory, digest):
        return
    import transformers

    with torch.device("meta"):
        kind: Any = transformers.AutoConfig.for_model(**config)
        auto = transformers.AutoModelForMaskedLM if run.experiment.model.masked else transformers.AutoModelForCausalLM
        model = auto.from_config(kind)  # type: ignore[no-untyped-call]
    end = config["eos_token_id"]
    model.load_state_dict(dict(_translated(run.experiment, weights)), strict=True, assign=True)
    model.tie_weights()
    if not run.experiment.model.masked:
        ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
        model.generation_config = transformers.GenerationConfig(**ends)  # type: ignore[no-untyped-call]
    with written_whole(directory, KIND) as aside, _without_progress():
        model.save_pretrained(aside)
        _save_tokenizer(run, aside)
        (aside / CARD).write_text(model_card(run, {}), encoding="utf-8")


@contextmanager
def _without_progress() -> Iterator[None]:
    """Suppress the bars of transformers, one for each file of weights."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def check_target(directory: Path, digest: str | None = None) -> None:
    """Raise InputError if a model cannot be exported to ``directory``. Nothing is changed.

    Args:
        directory: as of ``export``.
        digest: of the weights; None if it is not known yet, and any model exported there may be that one.
    """
    held = exported_digest(directory)
    if (held is not None and digest is None) or (digest is not None and _holds(directory, digest)):
        return
    check_replaceable(directory, KIND)
    check_writable(directory.parent, directory)


def _holds(directory: Path, digest: str) -> bool:
    """Whether ``directory`` is an export of these weights that need not be written again."""
    return exported_digest(directory) == digest and is_whole(directory, CARD)


def exported_digest(directory: Path) -> str | None:
    """Return the hash of the weights that ``export`` wrote to ``directory``; None if there are none."""
    try:
        origin = read_json(directory / "config.json", dict[str, Any]).get(ORIGIN)
    except InputError:
        return None
    digest = origin.get("weights_sha256") if isinstance(origin, dict) else None
    return digest if isinstance(digest, str) else None


def transformers_config(experiment: Experiment, corpus: Corpus) -> dict[str, Any]:
    """Return the fields of a configuration, ``model_type`` too. Raises InputError if transformers has no such model."""
    model, kind = experiment.model, _model_type(experiment)
    end, size = int(corpus.meta["end_of_document"]), model.hidden_size // model.n_heads
    common = {
        "model_type": kind,
        "vocab_size": corpus.vocab_size,
        "bos_token_id": end,
        "eos_token_id": end,
        "tie_word_embeddings": model.tied,
        "initializer_range": 0.02,
        "dtype": "float32",
    }
    if kind == "gpt2":
        return common | {
            "n_positions": experiment.data.sequence_length,
            "n_embd": model.hidden_size,
            "n_layer": model.n_layers,
            "n_head": model.n_heads,
            "n_inner": model.intermediate_size,
            "activation_function": "gelu_new" if model.gelu == "tanh" else "gelu",
            "layer_norm_epsilon": LAYER_NORM_EPS,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    rope = {"rope_type": "default", "rope_theta": ROTARY_BASE}
    common |= {
        "max_position_embeddings": experiment.data.sequence_length,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "attention_bias": False,
    }
    if kind == "modernbert":
        return common | {
            "layer_types": ["full_attention"] * model.n_layers,
            "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
            "hidden_activation": "gelu",
            "classifier_activation": "gelu",
            "norm_eps": LAYER_NORM_EPS,
            "decoder_bias": True,
            "cls_token_id": end,
            "sep_token_id": end,
            "pad_token_id": end,
        }
    common |= {
        "num_key_value_heads": model.n_heads,
        "head_dim": size,
        "rms_norm_eps": RMS_EPS,
        "rope_parameters": rope,
    }
    match kind:
        case "llama":
            return common | {"hidden_act": "silu", "mlp_bias": False}
        case "qwen3":
            return common | {"hidden_act": "silu", "use_sliding_window": False}
        case _:
            return common | {
                "hidden_activation": "silu",
                "rms_norm_eps": RMS_EPS * model.hidden_size,  # of activations that are √H as long: see _vaultgemma
                "query_pre_attn_scalar": size,
                "layer_types": ["full_attention"] * model.n_layers,
                "sliding_window": experiment.data.sequence_length,  # asked for, though no layer has one
                "attn_logit_softcapping": None,
                "final_logit_softcapping": experiment.loss.softcap,
                "pad_token_id": None,
            }


def _model_type(experiment: Experiment) -> str:
    """The name that transformers has for the architecture. Raises InputError if it has none."""
    model = experiment.model
    usual = model.norm_name == model.model_copy(update={"norm": None}).norm_name
    extras = [] if usual else [model.norm_name]
    extras += ["model.qk_norm"] if model.qk_norm else []
    extras += ["loss.softcap"] if experiment.loss.softcap else []
    match model.family, extras:
        case family, []:
            return family
        case "llama", ["model.qk_norm"]:
            return "qwen3"
        case "llama", ["loss.softcap"]:
            return "vaultgemma"
    raise InputError(
        f"{experiment.run.name}: transformers has no {model.family} with {' and '.join(extras)}; the run can be "
        "evaluated, but not exported"
    )


def _translated(experiment: Experiment, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our weights under the names and in the layouts of transformers."""
    kind = _model_type(experiment)
    translate = {"gpt2": _gpt2, "vaultgemma": _vaultgemma, "modernbert": _modernbert}.get(kind, _llama)
    yield from translate(experiment.model, ours)
    yield f"{'decoder' if kind == 'modernbert' else 'lm_head'}.weight", ours["head.weight"]


def _gpt2(model: Model, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    def norm(theirs: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield f"{theirs}.weight", weight
        yield f"{theirs}.bias", torch.zeros_like(weight)

    def linear(theirs: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield f"{theirs}.weight", weight.T.contiguous()  # stored (in, out) there
        yield f"{theirs}.bias", weight.new_zeros(len(weight))

    yield "transformer.wte.weight", ours["token_embedding.weight"]
    yield "transformer.wpe.weight", ours["position_embedding.weight"]
    for i in range(model.n_layers):
        a, b = f"blocks.{i}", f"transformer.h.{i}"
        yield from norm(f"{b}.ln_1", ours[f"{a}.attention_norm.weight"])
        yield from linear(f"{b}.attn.c_attn", _qkv(model, ours, a))
        yield from linear(f"{b}.attn.c_proj", ours[f"{a}.attention.proj.weight"])
        yield from norm(f"{b}.ln_2", ours[f"{a}.mlp_norm.weight"])
        yield from linear(f"{b}.mlp.c_fc", ours[f"{a}.mlp.fc.weight"])
        yield from linear(f"{b}.mlp.c_proj", ours[f"{a}.mlp.proj.weight"])
    yield from norm("transformer.ln_f", ours["final_norm.weight"])


def _qkv(model: Model, ours: Mapping[str, Tensor], block: str) -> Tensor:
    """Return the projections to queries, keys and values one below the other, (3·hidden_size, hidden_size)."""
    if model.qkv == "fused":
        return ours[f"{block}.attention.qkv.weight"]
    return torch.cat([ours[f"{block}.attention.qkv.{part}"].flatten(0, -2) for part in "qkv"])


def _llama(model: Model, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield "model.embed_tokens.weight", ours["token_embedding.weight"]
    for i in range(model.n_layers):
        a, b = f"blocks.{i}", f"model.layers.{i}"
        for name, part in zip(("q_proj", "k_proj", "v_proj"), _qkv(model, ours, a).chunk(3), strict=True):
            yield f"{b}.self_attn.{name}.weight", part.contiguous()
        if model.qk_norm:
            yield f"{b}.self_attn.q_norm.weight", ours[f"{a}.attention.q_norm.weight"]
            yield f"{b}.self_attn.k_norm.weight", ours[f"{a}.attention.k_norm.weight"]
        yield f"{b}.self_attn.o_proj.weight", ours[f"{a}.attention.proj.weight"]
        yield f"{b}.mlp.gate_proj.weight", ours[f"{a}.mlp.gate.weight"]
        yield f"{b}.mlp.up_proj.weight", ours[f"{a}.mlp.fc.weight"]
        yield f"{b}.mlp.down_proj.weight", ours[f"{a}.mlp.proj.weight"]
        yield f"{b}.input_layernorm.weight", ours[f"{a}.attention_norm.weight"]
        yield f"{b}.post_attention_layernorm.weight", ours[f"{a}.mlp_norm.weight"]
    yield "model.norm.weight", ours["final_norm.weight"]


def _modernbert(model: Model, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield "model.embeddings.tok_embeddings.weight", ours["token_embedding.weight"]
    yield "model.embeddings.norm.weight", ours["embedding_norm.weight"]
    for i in range(model.n_layers):
        a, b = f"blocks.{i}", f"model.layers.{i}"
        if i > 0:
            yield f"{b}.attn_norm.weight", ours[f"{a}.attention_norm.weight"]
        yield f"{b}.attn.Wqkv.weight", _qkv(model, ours, a)
        yield f"{b}.attn.Wo.weight", ours[f"{a}.attention.proj.weight"]
        yield f"{b}.mlp_norm.weight", ours[f"{a}.mlp_norm.weight"]
        yield f"{b}.mlp.Wi.weight", torch.cat([ours[f"{a}.mlp.gate.weight"], ours[f"{a}.mlp.fc.weight"]])
        yield f"{b}.mlp.Wo.weight", ours[f"{a}.mlp.proj.weight"]
    yield "model.final_norm.weight", ours["final_norm.weight"]
    yield "head.dense.weight", ours["transform.dense.weight"]
    yield "head.norm.weight", ours["transform.norm.weight"]
    yield "decoder.bias", ours["head.bias"]


def _vaultgemma(model: Model, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """As LLaMA's, to float32 rounding. It multiplies embeddings by √H, and RMSNorm by 1 + weight.

    The blocks add √H times as much each, and RMSNorm, with an ε that is H times as large, takes the factor off again.
    """
    for name, weight in _llama(model, ours):
        theirs = name.replace("post_attention_layernorm", "pre_feedforward_layernorm")
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight = weight * math.sqrt(model.hidden_size)
        elif name.endswith("norm.weight"):
            weight = weight - 1
        yield theirs, weight


def _save_tokenizer(run: Run, directory: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    end = run.corpus.tokenizer.id_to_token(int(run.corpus.meta["end_of_document"]))
    special = {"bos_token": end, "eos_token": end, "unk_token": end}
    if run.experiment.model.masked:
        special |= {"mask_token": MASK, "pad_token": end}
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(run.corpus.directory / "tokenizer.json"),
        model_max_length=run.experiment.data.sequence_length,
        clean_up_tokenization_spaces=False,
        **special,
    )
    if run.experiment.model.masked and tokenizer.mask_token_id != mask_token(run.corpus):
        raise InputError(f"{run.corpus.directory}: {MASK} is a token of the text; the model has another to mask with")
    tokenizer.save_pretrained(directory)
    # transformers 5 has another name for this class, which older versions do not know; both know this one.
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(path, config)


def write_model_card(run: Run, directory: Path, figures: Mapping[str, str]) -> None:
    """Update the card of an exported model with what was measured of it: labels and values, ready to print."""
    if (directory / MANIFEST).exists():  # else it was exported by an older version
        update_file(directory, CARD, model_card(run, figures))


def _parts(run: Run) -> str:
    """Say of a run that was trained longer what it was before."""
    return "".join(f"; up to step {steps:,} as a run of {steps:,} steps" for steps in run.planned[:-1])


def model_card(run: Run, figures: Mapping[str, str]) -> str:
    """Return the README.md of the directory: what the model is, and its figures."""
    e = run.experiment
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'fill-mask' if e.model.masked else 'text-generation'}",
        "tags: [coupled-adam]",
        "---",
        f"# {e.run.name}",
        "",
        f"A {e.model.label}-like {'masked ' if e.model.masked else ''}language model: {e.model.n_layers} layers, "
        f"{e.model.n_heads} heads, hidden size {e.model.hidden_size}, {run.corpus.vocab_size:,} rows in the "
        f"{'tied ' if e.model.tied else ''}embedding, sequences of {e.data.sequence_length:,} tokens. "
        f"Trained from seed {e.run.seed} on {run.step * e.train.batch_tokens:,} tokens of {run.corpus.meta['source']} "
        f"with {e.method} on the output embedding and {e.optimizer.core.name} on the rest "
        f"(step {run.step:,} of {e.train.steps:,}{_parts(run)}).",
        "",
    ]
    if e.model.logits == "bfloat16":
        lines += ["Its logits were rounded to bfloat16 in training, and for the metrics below; here they are not.", ""]
    if figures:
        lines += ["| metric | value |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in figures.items())]
        lines.append("")
    lines += [
        "Made with coupled-adam. Method: Stollenwerk & Stollenwerk, “Better Embeddings with Coupled Adam”, ACL 2025, "
        "arXiv 2502.08441.",
        "",
    ]
    return "\n".join(lines)
