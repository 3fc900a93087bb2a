"""What an audit does not measure is said: packed heads, missing parts, adapters, tokenizers that do not load."""

import fnmatch
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from typer.testing import CliRunner

from coupled_adam import geometry
from coupled_adam.audit.centering import center
from coupled_adam.audit.embedding_files import read_embeddings
from coupled_adam.audit.models import audit_models
from coupled_adam.cli import app
from coupled_adam.errors import InputError

V, H = 64, 32
INPUT, HEAD = "model.embed_tokens.weight", "lm_head.weight"
E = torch.randn(V, H, generator=torch.Generator().manual_seed(0)) + 0.3
UNTIED: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}


def model(directory: Path, config: dict[str, Any] | None = None, **tensors: Tensor) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({INPUT: E, **named}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(UNTIED if config is None else config))
    return str(directory)


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.ones(shape, dtype=torch.int64).to(dtype)


PACKED: dict[str, dict[str, Tensor]] = {
    "gptq": {"lm_head__qweight": ints(H // 8, V), "lm_head__scales": torch.ones(1, V), "lm_head__g_idx": ints(H)},
    "awq": {
        "lm_head__qweight": ints(H, V // 8),
        "lm_head__qzeros": ints(1, V // 8),
        "lm_head__scales": torch.ones(1, V),
    },
    "mlx": {"lm_head__weight": ints(V, H // 8, dtype=torch.uint32), "lm_head__scales": torch.ones(V, 1)},
    "bitsandbytes-4": {"lm_head__weight": ints(V * H // 2, 1, dtype=torch.uint8), "lm_head__weight.absmax": ints(4)},
    "bitsandbytes-8": {"lm_head__weight": ints(V, H, dtype=torch.int8), "lm_head__SCB": torch.ones(V)},
    "compressed-tensors": {"lm_head__weight_packed": ints(V, H // 8), "lm_head__weight_scale": torch.ones(V, 1)},
    "fp8": {"lm_head__weight": torch.ones(V, H).to(torch.float8_e4m3fn), "lm_head__weight_scale": torch.ones(1)},
    "fp8-e5m2": {"lm_head__weight": torch.ones(V, H).to(torch.float8_e5m2)},
    "uint8": {"lm_head__weight": ints(V, H // 2, dtype=torch.uint8)},
}


@pytest.mark.parametrize("form", PACKED)
def test_a_packed_head_is_named_in_every_output(form: str, tmp_path: Path) -> None:
    path = model(tmp_path / "m", **PACKED[form])
    (audited,), _ = audit_models([path], ())
    assert audited.name == "m (input)"
    assert audited.findings[0].level == "note"
    assert audited.findings[0].text.startswith("Its output embedding lm_head.")
    assert "not measured" in audited.findings[0].text
    with pytest.raises(InputError, match=r"not centered: Its output embedding lm_head"):
        center(read_embeddings(path), tmp_path / "copy")


def test_the_note_reaches_table_json_and_page(tmp_path: Path) -> None:
    arguments = ["audit", model(tmp_path / "m"), "--html", str(tmp_path / "page.html")]
    said = "is not tied, but its files have no output embedding under a known name"
    table = CliRunner().invoke(app, arguments).stdout
    assert said in " ".join(table.split()) and "m (input)" in table
    (found,) = json.loads(CliRunner().invoke(app, [*arguments[:2], "--json"]).stdout)
    assert found["matrix"] == "input" and said in found["findings"][0]["text"]
    assert said in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("config", "note"),
    [
        (UNTIED, "says that it is not tied"),
        ({"architectures": ["SomeForCausalLM"], "model_type": "somebodys"}, "does not say whether it is tied"),
        ({**UNTIED, "tie_word_embeddings": True}, None),
        ({**UNTIED, "architectures": ["LlamaModel"]}, None),
        ({"architectures": ["SomeModel"], "model_type": "somebodys"}, None),
    ],
    ids=["untied", "silent", "tied", "encoder", "unknown-encoder"],
)
def test_a_head_that_is_missing_is_told_unless_there_is_none(
    config: dict[str, Any], note: str | None, tmp_path: Path
) -> None:
    read = read_embeddings(model(tmp_path / "m", config))
    assert read.lacks_output is (note is not None)
    assert (note is None and read.notes == ()) or (note is not None and note in read.notes[0])


def test_layers_within_a_model_are_no_packed_head(tmp_path: Path) -> None:
    inner = {f"model.layers.0.attention.output.{kind}": ints(8, 8) for kind in ("qweight", "qzeros")}
    read = read_embeddings(model(tmp_path / "m", {**UNTIED, "tie_word_embeddings": True}, **inner))
    assert (read.tied, read.notes) == (True, ())


def write_gguf(path: Path, part: tuple[int, int] | None = None, big: bool = False, **tensors: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG if big else gguf.GGUFEndian.LITTLE)
    if part:
        writer.add_uint16("split.no", part[0])
        writer.add_uint16("split.count", part[1])
    for name, matrix in tensors.items():
        writer.add_tensor(name.replace("__", "."), np.array(matrix))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_parts_of_a_gguf_model_are_read_together(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "m-00001-of-00002.gguf", (0, 2), token_embd__weight=E.numpy())
    second = write_gguf(tmp_path / "m-00002-of-00002.gguf", (1, 2), output__weight=E.numpy() + 1)
    for path in (first, second):
        read = read_embeddings(str(path))
        assert torch.equal(read.input, E) and read.output is not None and torch.equal(read.output, E + 1)
        assert (read.tied, read.notes) == (False, ())
    alone = [(tmp_path / str(i)) for i in range(3)]
    for directory in alone:
        directory.mkdir()
    first = first.rename(alone[0] / first.name)
    read = read_embeddings(str(first))
    assert (read.tied, read.lacks_output) == (None, True)
    assert "is part 1 of 2. The model has 2 parts, and m-00002-of-00002.gguf is missing." in read.notes[0]
    second = second.rename(alone[1] / second.name)
    with pytest.raises(
        InputError, match=r"is part 2 of 2\. .*m-00001-of-00002\.gguf is missing.*output\.weight 64 × 32"
    ):
        read_embeddings(str(second))
    assert torch.equal(read_embeddings(str(second), tensor="output.weight").input, E + 1)
    renamed = first.rename(alone[2] / "renamed.gguf")
    assert "renamed.gguf is part 1 of 2" in read_embeddings(str(renamed)).notes[0]


def test_a_gguf_file_in_the_other_byte_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="big-endian"):
        read_embeddings(str(write_gguf(tmp_path / "m.gguf", big=True, token_embd__weight=E.numpy())))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_part_of_a_model_is_read_with_those_beside_it(suffix: str, tmp_path: Path) -> None:
    write: Callable[..., object] = save_file if suffix == "safetensors" else torch.save
    first, second = (tmp_path / f"model-0000{n}-of-00002.{suffix}" for n in (1, 2))
    write({INPUT: E}, first)
    write({HEAD: E + 1}, second)
    for path in (first, second):
        read = read_embeddings(str(path))
        assert torch.equal(read.input, E) and read.output is not None and torch.equal(read.output, E + 1)
    with pytest.raises(InputError, match="not centered: "):
        center(read_embeddings(str(first)), tmp_path / f"copy.{suffix}")
    second.unlink()
    read = read_embeddings(str(first))
    assert read.lacks_output and f"{second.name} is missing" in read.notes[0]


@pytest.mark.parametrize("folder", ["0_StaticEmbedding", "0_Transformer", ""])
def test_the_folder_that_modules_name_is_read(folder: str, tmp_path: Path) -> None:
    directory = tmp_path / "sentences"
    (directory / folder).mkdir(parents=True)
    modules = [{"idx": 0, "path": folder, "type": "…"}, {"idx": 1, "path": "1_Pooling", "type": "…"}]
    (directory / "modules.json").write_text(json.dumps(modules))
    save_file({"embedding.weight": E}, directory / folder / "model.safetensors")
    (directory / folder / "vocab.txt").write_text("[UNK]\nlake\n")
    (directory / folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    read = read_embeddings(str(directory))
    assert torch.equal(read.input, E) and read.name == "sentences"
    assert read.words is not None and read.words.token_of("lake") == 1


@pytest.mark.parametrize("path", ["../elsewhere", "link", "/"])
def test_modules_do_not_lead_out_of_a_model(path: str, tmp_path: Path) -> None:
    for directory in (tmp_path / "m", tmp_path / "elsewhere"):
        directory.mkdir()
    save_file({"embedding.weight": E}, tmp_path / "elsewhere" / "model.safetensors")
    (tmp_path / "m" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "m" / "modules.json").write_text(json.dumps([{"path": path}]))
    with pytest.raises(InputError, match=r"modules\.json: names .* outside the model"):
        read_embeddings(str(tmp_path / "m"))


@pytest.mark.parametrize(
    "infix", ["modules_to_save.default.", "base_layer.", "modules_to_save.mine."], ids=["default", "lora", "named"]
)
def test_names_that_peft_gives(infix: str, tmp_path: Path) -> None:
    names = [f"base_model.model.{name}".replace("weight", f"{infix}weight") for name in (INPUT, HEAD)]
    frozen = {f"base_model.model.model.embed_tokens.original_module.{k}": E + 9 for k in ("weight",)}
    torch.save({names[0]: E, names[1]: E + 1, **frozen}, tmp_path / "m.pt")
    read = read_embeddings(str(tmp_path / "m.pt"))
    assert torch.equal(read.input, E) and read.output is not None and torch.equal(read.output, E + 1)
    assert [("without its adapter" in note) for note in read.notes] == [True] * 2 * (infix == "base_layer.")
    chosen = read_embeddings(str(tmp_path / "m.pt"), tensor=names[0])
    assert len(chosen.notes) == (infix == "base_layer.")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_names_its_base_model(name: str, tmp_path: Path) -> None:
    content = {"base_model.model.model.layers.0.q_proj.lora_A.weight": torch.ones(4, H)}
    for with_input in (False, True):
        content |= {f"base_model.model.{INPUT}": E} if with_input else {}
        save_file(content, tmp_path / name) if name.endswith("s") else torch.save(content, tmp_path / name)
        (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
        if with_input:
            assert "base model some/base" in read_embeddings(str(tmp_path)).notes[0]
        else:
            with pytest.raises(InputError, match=r"an adapter; .* base model some/base: audit that"):
                read_embeddings(str(tmp_path))


@pytest.mark.parametrize("weighted", [False, True])
def test_tokens_that_share_vectors_get_a_row_each(weighted: bool, tmp_path: Path) -> None:
    mapping = torch.arange(200) % V
    content = {"embeddings": E, "mapping": mapping}
    expected = E[mapping]
    if weighted:
        content["weights"] = torch.linspace(1, 2, 200)
        expected = expected * content["weights"][:, None]
    save_file(content, tmp_path / "model.safetensors")
    read = read_embeddings(str(tmp_path))
    assert torch.equal(read.input, expected) and "200 tokens share 64 vectors" in read.notes[0]
    content["mapping"] = mapping + 1
    save_file(content, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="'mapping' names rows"):
        read_embeddings(str(tmp_path))


def test_a_tokenizer_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    path = model(tmp_path / "m", {**UNTIED, "architectures": ["LlamaModel"]})
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    (note,) = read_embeddings(path).notes
    assert note.startswith("Its tokenizer could not be loaded, so words were left out (")


def test_control_characters_in_names_are_shown(tmp_path: Path) -> None:
    title = "\x1b]0;owned\x07"
    save_file({f"{title}.a": E, f"{title}.b": E + 1}, tmp_path / f"{title}.safetensors")
    with pytest.raises(InputError, match=r"\\x1b\]0;owned\\x07\.a") as error:
        read_embeddings(str(tmp_path / f"{title}.safetensors"))
    assert "\x1b" not in str(error.value) and "\n" not in str(error.value)


def test_of_a_model_on_the_hub_the_folders_of_its_modules_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, local = tmp_path / "remote", tmp_path / "local"
    (remote / "0_StaticEmbedding").mkdir(parents=True)
    (remote / "modules.json").write_text('[{"idx": 0, "path": "0_StaticEmbedding"}]')
    save_file({"embedding.weight": E}, remote / "0_StaticEmbedding" / "model.safetensors")
    (remote / "0_StaticEmbedding" / "onnx.bin").write_bytes(b"not needed")

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        for path in (path for path in remote.rglob("*") if path.is_file()):
            place = path.relative_to(remote)
            if any(fnmatch.fnmatch(place.as_posix(), pattern) for pattern in allow_patterns):
                (local / place.parent).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, local / place)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    read = read_embeddings("somebody/static")
    assert torch.equal(read.input, E) and read.name == "somebody/static"
    assert not (local / "0_StaticEmbedding" / "onnx.bin").exists()


def test_a_vocabulary_of_words_without_one_for_others_is_read(tmp_path: Path) -> None:
    path = model(tmp_path / "m", {**UNTIED, "architectures": ["LlamaModel"]})
    Tokenizer(WordLevel({"lake": 0, "dog": 1}, "")).save(f"{path}/tokenizer.json")
    words = read_embeddings(path).words
    assert words is not None and (words.token_of("dog"), words.token_of("sea")) == (1, None)
    ((audited,), _) = audit_models([path], geometry.published_benchmarks())
    assert audited.measured.mean_similarity is None
