"""param_groups: roles by identity, on our model, on others', and on plain modules."""

import re
import warnings

import pytest
import torch
import transformers
from torch import nn

from coupled_adam import Adams, Adams_ZeRO, CoupledAdam, center_, param_groups
from coupled_adam.lm.config import Model
from coupled_adam.lm.model import build_model


def names(groups: list[dict]) -> list[list[str]]:
    return [[name for name, _ in group["params"]] for group in groups]


def tiny_llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes))


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


class Plain(nn.Module):
    """A module that says nothing of its embeddings: input, two layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.norm = nn.Embedding(9, 4), nn.Linear(4, 20), nn.LayerNorm(4)
        self.head = nn.Linear(4, 7)


SPELLINGS = {
    "module": lambda m: m.head,
    "parameter": lambda m: m.head.weight,
    "name of a module": lambda m: "head",
    "name of a parameter": lambda m: "head.weight",
    "list": lambda m: [m.head],
    "tuple of names": lambda m: ("head",),
    "set": lambda m: {m.head},
    "generator": lambda m: (module for module in [m.head]),
    "ModuleList": lambda m: nn.ModuleList([m.head]),
    "nested": lambda m: [[m.head.weight]],
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, torch.compile], ids=["plain", "parallel", "compiled"])
def test_every_spelling_couples_the_same(spelling, wrap) -> None:
    model = Plain()
    groups = param_groups(wrap(model), coupled=spelling(model))
    assert [p for _, p in groups[0]["params"]] == [model.head.weight]
    assert groups[0]["second_moment"] == "vocabulary" and "second_moment" not in groups[1]


@pytest.mark.parametrize(
    ("coupled", "error", "message"),
    [
        ("hed", ValueError, "of Plain, or their names, got the string 'hed'; did you mean 'head'?"),
        (["head", "tabel.weight"], ValueError, "got the string 'tabel.weight'; did you mean 'table.weight'?"),
        ("", ValueError, "got the string ''. Candidates: head.weight (7, 4)"),
        ("zzz", ValueError, "got the string 'zzz'. Candidates: head.weight (7, 4)"),
        (3, TypeError, "expected modules or parameters of Plain, or their names, got 3; coupled=[] couples nothing"),
        (True, TypeError, "got True"),
        ([None], TypeError, "got None"),
        ({"head": 1}, TypeError, "got a dict"),
        (b"head", TypeError, "got 104"),
        (nn.Embedding(9, 4), ValueError, "got an Embedding that is not in Plain. Candidates: head.weight (7, 4)"),
        ([torch.zeros(9, 4)], ValueError, "got a tensor of shape (9, 4) that is not in Plain"),
        (nn.ReLU(), ValueError, "got a ReLU that has no weight"),
        ("norm", ValueError, "'norm.weight' has shape (4,); only (vocabulary, hidden) matrices couple"),
    ],
)
def test_anything_else_is_told_in_words(coupled, error, message) -> None:
    with pytest.raises(error, match=re.escape(message)) as raised:
        param_groups(Plain(), coupled=coupled)
    assert "\n" not in str(raised.value)


def test_a_plain_module_lists_heads_before_its_input_embedding() -> None:
    listed = "head.weight (7, 4), up.weight (20, 4), table.weight (9, 4)"
    with pytest.raises(ValueError, match=rf"get_output_embeddings.*or coupled=\[\] .*Candidates: {re.escape(listed)}$"):
        param_groups(Plain())


def test_a_part_that_knows_its_output_embedding_is_named() -> None:
    model = nn.ModuleDict({"lm": tiny_llama(), "value": nn.Linear(16, 1)})
    with pytest.raises(ValueError, match=r"Its part 'lm' does: coupled=model.lm.get_output_embeddings\(\)"):
        param_groups(model)


def test_what_is_no_model_is_told() -> None:
    with pytest.raises(TypeError, match="param_groups takes a model, not a generator"):
        param_groups(Plain().parameters())
    for optimizer in (CoupledAdam, Adams, Adams_ZeRO):
        with pytest.raises(TypeError, match=r"not a model: \w+\(param_groups\(model\)"):
            optimizer(Plain())
    with pytest.raises(TypeError, match="not a Plain: center_"):
        center_(Plain())


def test_without_names_they_fit_an_optimizer_that_takes_none() -> None:
    groups = [{**group, "params": [p for _, p in group["params"]]} for group in param_groups(Plain(), coupled="head")]
    assert all(isinstance(p, nn.Parameter) for group in groups for p in group["params"])
    CoupledAdam(groups)


def test_nothing_coupled_by_choice_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = CoupledAdam(param_groups(Plain(), coupled=[]))
    assert {group["second_moment"] for group in optimizer.param_groups} == {"elementwise"}


def test_vectors_and_frozen_matrices_cannot_be_coupled() -> None:
    model = nn.Sequential(nn.Linear(4, 9))
    with pytest.raises(ValueError, match=r"'0.bias' has shape \(9,\)"):
        param_groups(model, coupled=[model[0].bias])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'0.weight' is frozen"):
        param_groups(model, coupled=[model[0]])


class Declared(Plain):
    """An untied model that says what its embeddings are."""

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_an_input_embedding_without_its_head_is_told() -> None:
    told = (
        r"table.weight is only the input embedding, and the output embedding, \S*head.weight \(7, 4\), is not coupled"
    )
    for model in (Declared(), nn.DataParallel(Declared()), nn.ModuleDict({"lm": Declared()})):
        (inner,) = (m for m in model.modules() if isinstance(m, Declared))
        with pytest.warns(UserWarning, match=told) as caught:
            param_groups(model, coupled=inner.table)
        assert caught[0].filename == __file__, "it points to the line that names the matrix"


@pytest.mark.parametrize(
    ("model", "coupled"),
    [
        (Declared(), None),
        (Declared(), ["table", "head"]),
        (Declared(), ["head"]),
        (Declared(), ["up"]),
        (Plain(), ["table"]),
    ],
)
def test_nothing_is_told_of_what_may_be_right(model: nn.Module, coupled: list[str] | None) -> None:
    """Both matrices, for instance for one learning rate, or a table of items that a softmax scores."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        param_groups(model, coupled=coupled)


def test_a_table_that_is_tied_by_a_module_or_by_words_is_no_input_alone() -> None:
    by_a_module, by_words = Declared(), Declared()
    by_a_module.up.weight = by_a_module.table.weight  # another head than the one declared
    by_words.get_output_embeddings = lambda: by_words.table
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (by_a_module, by_words):
            param_groups(model, coupled="table")


def test_a_single_row_is_told_and_steps_like_adamw() -> None:
    with pytest.warns(UserWarning, match="score.weight has one row.*that of AdamW"):
        groups = param_groups(nn.ModuleDict({"score": nn.Linear(4, 1)}), coupled="score")
    (matrix,) = (p for _, p in groups[0]["params"])
    alone = nn.Parameter(matrix.detach().clone())
    optimizers = CoupledAdam(groups), torch.optim.AdamW([alone], weight_decay=0.0)
    for _ in range(3):
        matrix.grad = torch.randn(1, 4)
        alone.grad = matrix.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(matrix, alone)
