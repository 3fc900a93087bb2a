"""Adapters on embeddings, written by PEFT: what is measured is what its merge_and_unload makes."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from coupled_adam.audit.centering import center
from coupled_adam.audit.embedding_files import read_embeddings
from coupled_adam.errors import InputError

V, H = 40, 16


def llama(tied: bool = False) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=H, n_layer=1, n_head=2, tie_word_embeddings=False))


def adapted(
    directory: Path, model: PreTrainedModel, embedding_layers: Any = "auto", kind: Any = LoraConfig, **options: Any
) -> PeftModel:
    """A model with a random adapter, saved; its base model beside it."""
    torch.manual_seed(0)
    model.save_pretrained(directory / "base")
    model.name_or_path = str(directory / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on embeddings
        lora = {"r": 4, "init_lora_weights": False} if kind is LoraConfig else {}
        made = get_peft_model(model, kind(**lora | options))
        for name, parameter in made.named_parameters():
            if "trainable_tokens_delta" in name:
                torch.nn.init.normal_(parameter)
        made.peft_config["default"].base_model_name_or_path = str(directory / "base")
        made.save_pretrained(directory / "adapter", save_embedding_layers=embedding_layers)
    return made


@pytest.mark.parametrize("embedding_layers", ["auto", False], ids=["base-saved", "base-beside"])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (llama, {"target_modules": ["embed_tokens", "lm_head"], "lora_alpha": 3}),
        (llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "use_rslora": True}),
        (
            llama,
            {
                "target_modules": ["embed_tokens", "lm_head"],
                "alpha_pattern": {"embed_tokens": 24, "model.lm_head": 99},
                "rank_pattern": {"^lm_head": 2, r"model\.embed.*": 3},
            },
        ),
        (gpt2, {"target_modules": ["wte", "lm_head", "c_attn"], "fan_in_fan_out": True}),
    ],
    ids=["alpha", "rslora", "patterns", "gpt2"],
)
def test_lora_on_embeddings_is_merged_as_peft_does(
    make: Any, options: dict[str, Any], embedding_layers: Any, tmp_path: Path
) -> None:
    model = adapted(tmp_path, make(), embedding_layers, **options)
    before = [model.get_input_embeddings().base_layer.weight.clone(), model.lm_head.base_layer.weight.clone()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = model.merge_and_unload()
    read = read_embeddings(str(tmp_path / "adapter"))
    assert read.output is not None
    for found, module, base in zip(
        (read.input, read.output), (whole.get_input_embeddings(), whole.lm_head), before, strict=True
    ):
        torch.testing.assert_close(found, module.weight.detach())
        assert not torch.allclose(found, base, atol=0.1)
    assert sum("with its adapter merged into it" in note for note in read.notes) == 2
    with pytest.raises(InputError, match="a base and an adapter; merge them first"):
        center(read, tmp_path / "copy")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (TrainableTokensConfig, {"target_modules": ["embed_tokens"], "token_indices": [1, 5]}),
        (LoraConfig, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}),
        (
            LoraConfig,
            {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 1], "lm_head": [2]}},
        ),
    ],
    ids=["alone", "with-lora", "two-modules"],
)
def test_trained_tokens_have_their_rows(kind: Any, options: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    model = adapted(tmp_path, llama(tied), False, kind, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = model.merge_and_unload()
    before, read = read_embeddings(str(tmp_path / "base")), read_embeddings(str(tmp_path / "adapter"))
    if not tied:  # merged, the two modules of a tied model are one, which they are not before
        torch.testing.assert_close(read.input, whole.get_input_embeddings().weight.detach())
    assert (read.input != before.input).any(1).nonzero().flatten().tolist() == [1, 5]
    if "lm_head" in str(options):
        assert read.output is not None
        old = before.input if before.output is None else before.output
        assert (read.output != old).any(1).nonzero().flatten().tolist() == [2]


def test_tokens_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    options = {"target_modules": ["embed_tokens"], "token_indices": [1, 5]}
    adapted(tmp_path, llama(), False, TrainableTokensConfig, **options)
    config = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(config.read_text())
    for tokens, message in (([1], "for 1 tokens does not fit"), ([1, V], "does not fit"), ("x", "does not say which")):
        config.write_text(json.dumps(said | {"token_indices": tokens}))
        with pytest.raises(InputError, match=message):
            read_embeddings(str(tmp_path / "adapter"))


def test_a_tied_base_gives_both_matrices(tmp_path: Path) -> None:
    model = adapted(tmp_path, llama(tied=True), False, target_modules=["embed_tokens", "lm_head"])
    read = read_embeddings(str(tmp_path / "adapter"))
    embedding, head = model.get_input_embeddings(), model.lm_head
    assert read.output is not None and read.tied is False
    torch.testing.assert_close(read.input, embedding.base_layer.weight + embedding.get_delta_weight("default"))
    torch.testing.assert_close(read.output, head.base_layer.weight + head.get_delta_weight("default"))


def test_with_lora_on_the_input_alone_the_rest_is_said_to_be_in_the_base(tmp_path: Path) -> None:
    adapted(tmp_path, llama(), target_modules=["embed_tokens"])
    Tokenizer(models.WordLevel({"lake": 0, "dog": 1}, "lake")).save(str(tmp_path / "adapter" / "tokenizer.json"))
    read = read_embeddings(str(tmp_path / "adapter"))
    assert read.output is None and "the rest of the model is in its base model" in read.notes[0]
    assert read.words is not None and read.words.token_of("dog") == 1
    named = "base_model.model.model.embed_tokens.base_layer.weight"
    assert "without its adapter" in read_embeddings(str(tmp_path / "adapter"), tensor=named).notes[-1]


def test_the_words_are_those_of_the_base_model_where_the_adapter_has_none(tmp_path: Path) -> None:
    adapted(tmp_path, llama(), False, target_modules=["embed_tokens"])
    Tokenizer(models.WordLevel({"lake": 0, "dog": 1}, "lake")).save(str(tmp_path / "base" / "tokenizer.json"))
    words = read_embeddings(str(tmp_path / "adapter")).words
    assert words is not None and words.token_of("dog") == 1


@pytest.mark.parametrize("options", [{"use_dora": True}, {"alora_invocation_tokens": [3]}], ids=["dora", "alora"])
def test_adapters_that_are_more_than_a_sum_are_not_merged(options: dict[str, Any], tmp_path: Path) -> None:
    adapted(tmp_path, llama(), target_modules=["embed_tokens"], use_dora="use_dora" in options)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | options))  # PEFT has no aLoRA on embeddings
    read = read_embeddings(str(tmp_path / "adapter"))
    assert "was measured without its adapter; merge it first (merge_and_unload)" in read.notes[-1]


def test_a_base_that_the_adapter_has_moved_is_not_added_to(tmp_path: Path) -> None:
    adapted(tmp_path, llama(), False, target_modules=["embed_tokens"], init_lora_weights=True)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"init_lora_weights": true', '"init_lora_weights": "pissa"'))
    with pytest.raises(InputError, match="an adapter; its input embeddings are in its base model"):
        read_embeddings(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": None}, "does not name its base model"),
        (
            {"base_model_name_or_path": "some/base"},
            "with an adapter, but the base cannot be read: some/ba",
        ),
        ({"base_model_name_or_path": "../../x"}, "the base cannot be read"),
        ({"r": None}, r"adapter_config\.json: damaged: no scaling"),
        ({"r": 0}, r"adapter_config\.json: damaged: no scaling"),
        ({"alpha_pattern": 5}, r"adapter_config\.json: damaged: no scaling"),
        ({"alpha_pattern": {"(": 5}}, r"adapter_config\.json: damaged: no scaling"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    adapted(tmp_path, llama(), False, target_modules=["embed_tokens"])
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(InputError, match=message) as error:
        read_embeddings(str(tmp_path / "adapter"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {}, "'.*lora_embedding_A' without '.*lora_embedding_B'"),
        (lambda b: {"lora_embedding_B": torch.zeros(0)}, "it was not gathered when saved"),
        (lambda b: {"lora_embedding_B": b[:5]}, "the base model may be another"),
    ],
)
def test_matrices_that_do_not_fit_are_one_line(change: Any, message: str, tmp_path: Path) -> None:
    adapted(tmp_path, llama(), False, target_modules=["embed_tokens"])
    path, prefix = tmp_path / "adapter" / "adapter_model.safetensors", "base_model.model.model.embed_tokens."
    content = load_file(path)
    b = content.pop(f"{prefix}lora_embedding_B")
    save_file(content | {prefix + name: tensor for name, tensor in change(b).items()}, path)
    with pytest.raises(InputError, match=message):
        read_embeddings(str(tmp_path / "adapter"))
