"""Exported models: transformers computes what ours computes, and needs nothing of ours."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    ModernBertForMaskedLM,
    Qwen3ForCausalLM,
    VaultGemmaForCausalLM,
)

from coupled_adam.errors import InputError
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.export import export, exported_digest, model_card
from coupled_adam.lm.model import build_model
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.run import Run, full_state_dict, open_run, sha256_of
from coupled_adam.lm.sources import TextFiles
from coupled_adam.lm.train import train


def trained(experiment: Experiment, text_file: Path, directory: Path) -> Run:
    """A run of two steps: the weights are no longer those of the initialization, and vectors no longer ones."""
    experiment = experiment.with_values(train__steps=2, schedule__warmup_steps=0, schedule__lr=0.05)
    corpus = prepare(TextFiles(text_file), experiment.data, directory / "corpus")
    train(experiment, corpus, directory / "run", lambda model, last: {})
    return open_run(directory / "run")


def exported(run: Run, directory: Path) -> Path:
    weights = full_state_dict(run.model())
    export(run, weights, sha256_of(weights), directory)
    return directory


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"model__family": "gpt2"}, GPT2LMHeadModel),
        ({"model__family": "gpt2", "model__gelu": "exact"}, GPT2LMHeadModel),
        ({"model__family": "gpt2", "model__qkv": "split"}, GPT2LMHeadModel),
        ({"model__family": "llama", "model__qkv": "heads"}, LlamaForCausalLM),
        ({"model__family": "llama"}, LlamaForCausalLM),
        ({"model__family": "llama", "model__qk_norm": True, "model__mlp_multiple": 8}, Qwen3ForCausalLM),
        ({"model__family": "llama", "loss__softcap": 0.5}, VaultGemmaForCausalLM),
        # Six is no power of two: √H is rounded.
        ({"model__family": "llama", "loss__softcap": 0.5, "model__hidden_size": 12}, VaultGemmaForCausalLM),
    ],
)
def test_the_logits_are_ours(settings, kind, tied, tiny, text_file, tmp_path) -> None:
    run = trained(tiny.with_values(model__tied=tied, **settings), text_file, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(exported(run, tmp_path / "model"))
    assert type(theirs) is kind and theirs.dtype == torch.float32
    tokens = torch.from_numpy(run.corpus.shards("validation")[0][:64].astype("int64")).view(4, 16)
    with torch.no_grad():
        found, expected = theirs(tokens).logits, run.model()(tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.05, "else the cap, and what is above the rounding, would not show"
    same = theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight
    assert same == tied
    assert torch.equal(theirs.get_output_embeddings().weight, run.model().head.weight), "as it was trained"
    if kind is GPT2LMHeadModel:
        biases = [p for name, p in theirs.named_parameters() if name.endswith("bias")]
        assert len(biases) == 2 * 6 + 1 and not any(p.any() for p in biases)
        assert theirs.config.activation_function == ("gelu" if run.experiment.model.gelu == "exact" else "gelu_new")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("qkv", ["split", "heads"])
def test_separate_queries_keys_and_values_are_exported_as_the_fused_ones(
    qkv, family, tiny, text_file, tmp_path
) -> None:
    corpus = prepare(TextFiles(text_file), tiny.data, tmp_path / "corpus")
    stored = []
    for how in ("fused", qkv):
        experiment = tiny.with_values(model__family=family, model__qkv=how)
        weights = build_model(experiment.model, corpus.vocab_size, 16, seed=3).state_dict()
        run = Run(tmp_path, experiment, corpus, tmp_path / "step-00000002")
        export(run, weights, sha256_of(weights), tmp_path / how)
        stored.append((tmp_path / how / "model.safetensors").read_bytes())
    assert stored[0] == stored[1]


@pytest.mark.parametrize("qkv", ["fused", "split"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_masked_model_is_a_modernbert_with_its_mask_token(tied, qkv, tiny, text_file, tmp_path) -> None:
    experiment = tiny.with_values(model__family="modernbert", model__tied=tied, model__qkv=qkv, data__vocab_size=300)
    run = trained(experiment, text_file, tmp_path)
    directory = exported(run, tmp_path / "model")
    theirs, tokenizer = AutoModelForMaskedLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    assert type(theirs) is ModernBertForMaskedLM and theirs.dtype == torch.float32
    assert theirs.decoder.bias.any(), "it was trained"
    tokens = torch.from_numpy(run.corpus.shards("validation")[0][:64].astype("int64")).view(4, 16)
    tokens[:, 3] = tokenizer.mask_token_id
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, run.model()(tokens), rtol=0, atol=1e-5)
    assert (theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight) == tied
    assert tokenizer.mask_token_id == 300 == len(tokenizer) - 1 and run.corpus.vocab_size == 320
    text = "the river [MASK] quickly"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(300) == 1 and tokenizer("the river")["input_ids"] == run.corpus.tokenizer.encode("the river").ids
    assert "fill-mask" in (directory / "README.md").read_text() and not (directory / "generation_config.json").exists()


def test_the_tokenizer_is_that_of_the_corpus(tiny, text_file, tmp_path) -> None:
    run = trained(tiny, text_file, tmp_path)
    theirs = AutoTokenizer.from_pretrained(exported(run, tmp_path / "model"))
    text = "the river walked, quickly!\n ünseen"
    assert theirs(text)["input_ids"] == run.corpus.tokenizer.encode(text).ids
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token_id == run.corpus.meta["end_of_document"]
    assert theirs.model_max_length == 16


@pytest.mark.long
def test_it_loads_and_writes_without_our_package(tiny, text_file, tmp_path) -> None:
    directory = exported(trained(tiny, text_file, tmp_path), tmp_path / "model")
    code = f"""
import sys
sys.modules["coupled_adam"] = None
from transformers import pipeline
print(pipeline("text-generation", {str(directory)!r})("the river", max_new_tokens=5)[0]["generated_text"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("the river")


def test_only_other_weights_are_written_again(tiny, text_file, tmp_path) -> None:
    run = trained(tiny, text_file, tmp_path)
    directory = exported(run, tmp_path / "model")
    weights = full_state_dict(run.model())
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert exported_digest(directory) == sha256_of(weights)
    exported(run, directory)
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
    weights["final_norm.weight"][0] += 1
    assert sha256_of(weights) != exported_digest(directory)
    export(run, weights, sha256_of(weights), directory)
    assert (directory / "model.safetensors").stat().st_mtime_ns > before
    assert AutoModelForCausalLM.from_pretrained(directory).transformer.ln_f.weight[0] == weights["final_norm.weight"][0]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model__norm": "rmsnorm"}, "gpt2 with rmsnorm"),
        ({"model__qk_norm": True, "loss__softcap": 30.0}, "gpt2 with model.qk_norm and loss.softcap"),
        ({"model__family": "llama", "model__norm": "layernorm"}, "llama with layernorm"),
        (
            {"model__family": "llama", "model__qk_norm": True, "loss__softcap": 30.0},
            "llama with model.qk_norm and loss.softcap",
        ),
    ],
)
def test_a_model_that_transformers_has_not_is_refused(settings, named, tiny, text_file, tmp_path) -> None:
    run = trained(tiny.with_values(**settings), text_file, tmp_path)
    with pytest.raises(
        InputError, match=f"^tiny: transformers has no {named}; the run can be evaluated, but not exported$"
    ):
        exported(run, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_card_tells_what_the_model_is(tiny, text_file, tmp_path) -> None:
    card = model_card(trained(tiny, text_file, tmp_path), {"perplexity": "12.35"})
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "on 128 tokens" in card and "Coupled Adam on the output embedding" in card and "rounded" not in card
    assert "| perplexity | 12.35 |" in card
    settings = {"model__tied": False, "model__logits": "bfloat16", "loss__mu_loss": 0.1}
    settings["optimizer__embedding__center"] = True
    card = model_card(trained(tiny.with_values(**settings), text_file, tmp_path / "other"), {})
    assert "with Coupled Adam + center + μ-loss (0.1) on the output embedding" in card
    assert "logits were rounded to bfloat16" in card


def test_the_second_moment_is_that_of_the_optimizer(tiny, text_file, tmp_path) -> None:
    for name, shape in (("adamw", (320, 16)), ("coupled_adam", (1, 16)), ("sgd", None)):
        run = trained(tiny.with_values(optimizer__embedding__name=name), text_file, tmp_path / name)
        moment = run.second_moment()
        assert (None if moment is None else tuple(moment.shape)) == shape
        assert moment is None or moment.min() >= 0 < moment.max()
    sgd = trained(tiny.with_values(model__tied=False, optimizer__embedding__name="sgd"), text_file, tmp_path / "v")
    assert sgd.second_moment() is None, "not that of the input embedding, which has AdamW"
    untied = trained(tiny.with_values(model__tied=False, optimizer__embedding__name="adamw"), text_file, tmp_path / "u")
    # Without a gradient through the input, every row of the output embedding has one all the same: the softmax's.
    assert (untied.second_moment().sum(1) > 0).all()


def test_runs_that_cannot_be_opened(tiny, text_file, tmp_path) -> None:
    with pytest.raises(InputError, match="not a run"):
        open_run(tmp_path)
    run = trained(tiny, text_file, tmp_path)
    (tmp_path / "corpus").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"corpus: the corpus of .*run was not found; pass its directory with --data"):
        open_run(run.directory)
    assert open_run(run.directory, tmp_path / "moved").step == 2
    other = text_file.with_name("other.txt")
    other.write_text(text_file.read_text() + "\n\nanother paragraph of text")
    prepare(TextFiles(other), tiny.data, tmp_path / "other")
    with pytest.raises(InputError, match="not the text that"):
        open_run(run.directory, tmp_path / "other")
    (run.checkpoint / "dcp" / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"step-00000002/dcp/.metadata: damaged"):
        open_run(run.directory, tmp_path / "moved").model()
    (run.checkpoint / "state.json").unlink()
    with pytest.raises(InputError, match="no checkpoint yet"):
        open_run(run.directory, tmp_path / "moved")
    assert json.loads((run.directory / "environment.json").read_text())["corpus_directory"] == str(tmp_path / "corpus")
