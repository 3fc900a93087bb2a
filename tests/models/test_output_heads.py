"""Answers of get_output_embeddings(), right and wrong: of models of transformers, under PEFT, and made up."""

import warnings
from collections.abc import Iterator

import pytest
import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from coupled_adam import CoupledAdam, param_groups
from coupled_adam.models.output_heads import vocabulary_sizes

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def tiny(name: str, config: str, **options) -> nn.Module:
    """A model of transformers without memory."""
    with torch.device("meta"):
        return getattr(transformers, name)(getattr(transformers, config)(**options))


def llama(name: str = "LlamaForCausalLM", **options) -> nn.Module:
    return getattr(transformers, name)(transformers.LlamaConfig(vocab_size=101, **SIZES, **options))


def coupled(groups: list[dict]) -> list[Tensor]:
    return [p for group in groups if group.get("second_moment") == "vocabulary" for _, p in group["params"]]


class Model(nn.Module):
    """An untied model that answers what it is told."""

    def __init__(self, rows: int = 40, config: object = None) -> None:
        super().__init__()
        self.embed, self.dense, self.head = nn.Embedding(40, 8), nn.Linear(8, 8), nn.Linear(8, rows, bias=False)
        self.answer, self.config = "head", config

    def get_output_embeddings(self) -> object:
        answer = self.answer
        return getattr(self, answer) if isinstance(answer, str) else answer(self) if callable(answer) else answer


ANSWERS = {
    "a module": lambda m: m.head,
    "a parameter": lambda m: m.head.weight,
    "a list": lambda m: [m.head],
    "a tuple of parameters": lambda m: (m.head.weight,),
    "a ModuleList": lambda m: nn.ModuleList([m.head]),
    "a ParameterList": lambda m: nn.ParameterList([m.head.weight]),
    "a ModuleDict": lambda m: nn.ModuleDict({"text": m.head}),
    "a dictionary of lists": lambda m: {"text": [m.head]},
    "a wrapper": lambda m: nn.Sequential(nn.LayerNorm(8), m.head),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_every_form_of_a_right_answer_is_understood(answer) -> None:
    model = Model()
    model.answer = answer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert coupled(param_groups(model)) == [model.head.weight]


@pytest.mark.parametrize(
    ("rows", "config"),
    [
        (40, None),
        (40, {"vocab_size": 40}),
        (40, {"text_config": {"vocab_size": 40}}),
        (40, {"vocab_size": 37}),  # the input embedding is padded too
        (64, {"vocab_size": 64}),  # not the input's vocabulary
        (64, {"vocab_size": 40}),  # the head alone is padded
        (39, {"vocab_size": 40}),  # one token is never predicted
        (64, {"decoder_config": {"padded_vocab_size": 64}, "vocab_size": 40}),
    ],
)
def test_rows_that_fit_the_vocabulary(rows, config) -> None:
    model = Model(rows, config)
    assert coupled(param_groups(model)) == [model.head.weight]


@pytest.mark.parametrize("config", [None, {"vocab_size": 40}, {"text_config": {"vocab_size": 40}}, {"vocab_size": 7}])
def test_a_matrix_that_does_not_fit_the_vocabulary_is_refused_with_the_right_one(config) -> None:
    model = Model(config=config)
    model.answer = "dense"
    if config == {"vocab_size": 7}:
        model.embed, model.head = nn.Embedding(7, 8), nn.Linear(8, 7)  # 8 rows may be 7 and padding
    with pytest.raises(ValueError, match=r"of Model returns dense.weight \(8, 8\), which does not fit.*head.weight"):
        param_groups(model)
    assert coupled(param_groups(model, coupled="head")) == [model.head.weight]


def test_a_shard_of_the_vocabulary_has_fewer_rows() -> None:
    model = Model(rows=10, config={"vocab_size": 40})
    model.head.weight.vocabulary_group = object()
    assert coupled(param_groups(model)) == [model.head.weight]


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_weight_that_is_computed_is_told(norm) -> None:
    model = Model()
    norm(model.head)
    with pytest.raises(
        ValueError, match=r"of Model returns a ParametrizedLinear, whose weight is not a parameter.*head.p"
    ):
        param_groups(model)
    with pytest.raises(ValueError, match=r"got the ParametrizedLinear 'head', whose weight is not a parameter"):
        param_groups(model, coupled="head")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (nn.Linear(8, 40), "returns a Linear, which has no weight that is a parameter of the model"),
        (nn.ReLU(), "returns a ReLU, which has no weight"),
        ("text", "returns a str, which is not a parameter"),
        (torch.zeros(40, 8), "returns a Tensor, which is not a parameter"),
    ],
)
def test_other_answers_are_told_as_what_they_are(answer, message) -> None:
    model = Model()
    model.answer = lambda _: answer
    with pytest.raises(ValueError, match=rf"get_output_embeddings\(\) of Model {message}"):
        param_groups(model)


def test_a_second_head_is_told() -> None:
    model = Model()
    model.mtp_heads = nn.ModuleList([nn.Linear(8, 40)])
    with pytest.warns(
        UserWarning, match=r"mtp_heads.0.weight \(40, 8\).*coupled=\['head.weight', 'mtp_heads.0.weight'\]"
    ):
        assert coupled(param_groups(model)) == [model.head.weight]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        param_groups(model, coupled=["head.weight"])
        assert len(coupled(param_groups(model, coupled=["head.weight", "mtp_heads.0.weight"]))) == 2
        model.mtp_heads.requires_grad_(False)
        param_groups(model)


def test_an_input_embedding_is_not_taken_where_there_is_a_head() -> None:
    model = Model()
    model.answer = "embed"
    with pytest.raises(ValueError, match=r"embed.weight \(40, 8\), the weight of an input.*coupled=\['head.weight'\]"):
        param_groups(model)
    model.head.weight = model.embed.weight
    assert coupled(param_groups(model)) == [model.embed.weight]


def test_no_answer_but_a_head_is_an_error_and_none_a_warning() -> None:
    model = Model(config={"vocab_size": 40})
    model.answer = None
    with pytest.raises(ValueError, match=r"returns None, but the output .*coupled=\['head.weight'\].*or coupled=\[\]"):
        param_groups(model)
    del model.head
    with pytest.warns(UserWarning, match=r"nothing is coupled.*Model has no output embedding.*coupled=\[\]"):
        assert coupled(param_groups(model)) == []


LANGUAGE_MODELS = {
    "DebertaV2 legacy": ("DebertaV2ForMaskedLM", "DebertaV2Config", {"legacy": True}),
    "Bert": ("BertForMaskedLM", "BertConfig", {}),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"num_key_value_heads": 2, "head_dim": 8}),
    "ModernBert": ("ModernBertForMaskedLM", "ModernBertConfig", {"pad_token_id": 0}),
    "ImageGPT": ("ImageGPTForCausalImageModeling", "ImageGPTConfig", {"n_layer": 1}),
}


@pytest.mark.parametrize(("name", "config", "options"), LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS)
def test_language_models(name, config, options) -> None:
    model = tiny(name, config, **({} if "n_layer" in options else SIZES | {"vocab_size": 101}), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert coupled(param_groups(model)) == [model.get_output_embeddings().weight]


def test_all_heads_of_musicgen_are_coupled() -> None:
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = tiny("MusicgenForCausalLM", "MusicgenDecoderConfig", vocab_size=64, **sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert coupled(param_groups(model, center=True)) == [head.weight for head in model.lm_heads]
    model.lm_heads[2].requires_grad_(False)
    assert len(coupled(param_groups(model))) == 3


WRONG = {
    "DebertaV2": (
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {**SIZES, "vocab_size": 101, "legacy": False},
        r"dense.weight \(16, 16\), which does not fit the vocabulary of 101 .*word_embeddings.weight \(101, 16\)$",
    ),
    "FSMT": ("FSMTForConditionalGeneration", "FSMTConfig", {}, r"coupled=\['model.decoder.output_projection.weight'\]"),
    "Wav2Vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", {}, r"returns None, .*coupled=\['lm_head.weight'\]"),
    "Blip": (
        "BlipForConditionalGeneration",
        "BlipConfig",
        {},
        r"coupled=\['text_decoder.cls.predictions.decoder.weight'",
    ),
}


@pytest.mark.parametrize(("name", "config", "options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_answers_of_models_of_transformers(name, config, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(tiny(name, config, **options))


def classifiers() -> Iterator[nn.Module]:
    yield tiny("BertForSequenceClassification", "BertConfig", vocab_size=101, **SIZES)
    yield llama("LlamaForSequenceClassification")
    yield llama("LlamaModel")
    yield nn.DataParallel(llama("LlamaForTokenClassification"))
    yield get_peft_model(llama("LlamaForSequenceClassification"), LoraConfig(TaskType.SEQ_CLS, r=2))
    yield tiny("ViTForImageClassification", "ViTConfig", **SIZES)


def frozen() -> Iterator[nn.Module]:
    for tied in (True, False):
        for options in (
            {},
            {"trainable_token_indices": [1, 2]},
            {"trainable_token_indices": {"lm_head": [1]}},
            {"target_modules": ["lm_head"]},
        ):
            given = {"r": 2, "target_modules": ["q_proj"], **options}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT on tied models
                yield get_peft_model(llama(tie_word_embeddings=tied), LoraConfig(**given))
    model = llama()
    model.lm_head.requires_grad_(False)
    yield model


@pytest.mark.parametrize("models", [classifiers, frozen])
def test_a_model_with_nothing_to_couple_trains_with_one_warning(models) -> None:
    for model in models():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            optimizer = CoupledAdam(param_groups(model))
        (told,) = [str(w.message) for w in caught if w.category is UserWarning]
        assert told.startswith("nothing is coupled, so CoupledAdam behaves exactly like AdamW: ") and told.endswith(
            "coupled=[]"
        )
        assert {group["second_moment"] for group in optimizer.param_groups} == {"elementwise"}


def test_a_head_that_peft_saves_is_coupled() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    (matrix,) = coupled(param_groups(torch.compile(model)))
    assert matrix is model.get_parameter("base_model.model.lm_head.modules_to_save.default.weight")


@pytest.mark.long
def test_every_language_model_of_transformers_couples_a_vocabulary_or_says_why_not() -> None:
    """With the default configurations that can be built on the meta device."""
    ends = ("LM_MAPPING", "TEXT_TO_TEXT_MAPPING", "SEQ_2_SEQ_MAPPING")
    names = [name for name in dir(modeling_auto) if name.startswith("MODEL_FOR_") and name.endswith(ends)]
    classes = {cls: config for name in names for config, cls in getattr(modeling_auto, name).items()}
    coupling = 0
    for cls, config in classes.items():
        try:
            with torch.device("meta"):
                model = cls(config())
        except Exception:  # needs a package, or arguments
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                matrices = coupled(param_groups(model))
            except ValueError as error:
                assert "coupled=[" in str(error), cls
                continue
        if not matrices:
            assert any("nothing is coupled" in str(w.message) for w in caught), cls
            continue
        coupling += 1
        sizes = vocabulary_sizes(model, model)
        assert all(any(-1 <= len(matrix) - size < 128 for size in sizes) for matrix in matrices), cls
    assert coupling > 250
