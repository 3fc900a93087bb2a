"""param_groups: roles by identity, on our model, on others', and on plain modules."""

import pytest
import torch
import transformers
from torch import nn

from coupled_adam import CoupledAdam, param_groups
from coupled_adam.lm.config import Model
from coupled_adam.lm.model import build_model


def names(groups: list[dict]) -> list[list[str]]:
    return [[name for name, _ in group["params"]] for group in groups]


def test_our_model() -> None:
    model = build_model(Model(n_layers=1, n_heads=2, hidden_size=8), vocab_size=64, sequence_length=4, seed=0)
    coupled, matrices, vectors = param_groups(model, weight_decay=0.3)
    assert names([coupled]) == [["token_embedding.weight"]]
    assert (coupled["second_moment"], coupled["weight_decay"]) == ("vocabulary", 0.0)
    assert "position_embedding.weight" in names([matrices])[0] and matrices["weight_decay"] == 0.3
    assert all(p.ndim == 1 for _, p in vectors["params"]) and vectors["weight_decay"] == 0.0
    grouped = [id(p) for group in (coupled, matrices, vectors) for _, p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_causal_models_of_transformers(family: str, tied: bool) -> None:
    if family == "gpt2":
        config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50, tie_word_embeddings=tied)
    else:
        config = transformers.LlamaConfig(
            num_hidden_layers=1,
            num_attention_heads=2,
            hidden_size=8,
            intermediate_size=16,
            vocab_size=50,
            tie_word_embeddings=tied,
        )
    model = transformers.AutoModelForCausalLM.from_config(config)
    coupled, matrices, vectors = param_groups(model)
    (parameter,) = [p for _, p in coupled["params"]]
    assert parameter is model.get_output_embeddings().weight
    is_matrix = [p is model.get_input_embeddings().weight for _, p in matrices["params"]]
    assert any(is_matrix) is not tied, "an untied input embedding is a matrix like any other"
    optimizer = CoupledAdam([coupled, matrices, vectors])
    tokens = torch.arange(10)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


def test_a_wrapped_model() -> None:
    model = build_model(Model(n_layers=1, n_heads=2, hidden_size=8), vocab_size=64, sequence_length=4, seed=0)
    groups = param_groups(nn.DataParallel(model))
    assert groups[0]["params"][0][1] is model.token_embedding.weight


def test_a_plain_module_when_told() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    assert names(param_groups(model, coupled=[model[1]])) == [["1.weight"], ["0.weight"]]
    assert names(param_groups(model, coupled=[model[0].weight, model[1]])) == [["0.weight", "1.weight"]]
    assert names(param_groups(model, coupled=[])) == [["0.weight", "1.weight"]]


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    model[0].requires_grad_(False)
    assert names(param_groups(model, coupled=[model[1]])) == [["1.weight"], ["1.bias"]]


def test_the_groups_fit_torch_optimizers() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    model(torch.tensor([1])).sum().backward()
    torch.optim.AdamW(param_groups(model, coupled=[model[1]])).step()


@pytest.mark.parametrize(
    ("coupled", "message"),
    [
        (None, r"get_output_embeddings.*Candidates: table.weight \(9, 4\), head.weight \(7, 4\)"),
        (["head"], "no parameter of this"),
        ([nn.Embedding(9, 4)], "no parameter of this.*Candidates"),
        (["bias"], "no parameter of this"),
    ],
)
def test_no_output_embedding_lists_candidates(coupled: list | None, message: str) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.table = nn.Linear(4, 7), nn.Embedding(9, 4)

    with pytest.raises(ValueError, match=message):
        param_groups(Plain(), coupled=coupled)


def test_vectors_and_frozen_matrices_cannot_be_coupled() -> None:
    model = nn.Sequential(nn.Linear(4, 9))
    with pytest.raises(ValueError, match=r"'0.bias' has shape \(9,\)"):
        param_groups(model, coupled=[model[0].bias])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'0.weight' is frozen"):
        param_groups(model, coupled=[model[0]])
