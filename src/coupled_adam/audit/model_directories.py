"""Model directories as transformers writes them: which files hold the weights, and what the configuration says."""

import functools
import re
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from coupled_adam.audit.embedding_names import candidates
from coupled_adam.audit.first_bytes import check_downloaded
from coupled_adam.audit.pickles import pickle_in, pickles_in
from coupled_adam.audit.tensor_files import Tensors, parsed, parts_beside, safetensors_in, safetensors_names
from coupled_adam.errors import InputError, one_line, printable
from coupled_adam.files import read_json
from coupled_adam.lm.words import Words, words_of

#: What is fetched of a model on the hub before its weights.
DESCRIPTION = [
    "config.json",
    "modules.json",
    "adapter_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "*.model",
    "*.index.json",
]

#: Architectures whose name says that they predict tokens. Others read them, and have no output embedding.
PREDICTS = re.compile(r"CausalLM|LMHead|MaskedLM|ConditionalGeneration|PreTraining|Seq2SeqLM")

#: Files of sentence-transformers with the list of words of its WordEmbeddings.
WORD_LISTS = ("whitespacetokenizer_config.json", "phrasetokenizer_config.json")

#: Files of a tokenizer that transformers can put together.
TOKENIZER_FILES = ("tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")

#: The key of a configuration that ties the embeddings, and the parts of a multimodal model's that may have it too.
TIED, LANGUAGE_PARTS = "tie_word_embeddings", ("text_config", "language_config", "llm_config")

SAFETENSORS, PICKLE, ADAPTER = "model.safetensors", "pytorch_model.bin", "adapter_model.bin"

#: The list of the parts of a sentence encoder, of which the first has the embeddings, in a folder named there or here.
MODULES = "modules.json"

#: Modules whose rows are the vectors of tokens, and those that make no more of them than a mean of length one; how the
#: former is said to be taken.
STATIC, AVERAGING = ("StaticEmbedding", "WordEmbeddings"), ("Pooling", "Normalize")
MEANS = ("mean", "pooling_mode_mean_tokens")

#: Files that are read by their own name alone.
OTHER_FILES = (".gguf", ".onnx", ".npy", ".npz", ".pt", ".pth", ".bin", ".ckpt", ".kv", ".vec")

T = TypeVar("T")


def folder_of_weights(directory: Path) -> Path:
    """Return where the weights of a model lie: in its directory, or in a folder that modules.json names.

    Raises:
        InputError: modules.json is damaged, or names a folder that lies elsewhere.
    """
    if _has_weights(directory):
        return directory
    folders = (_folder_of(module, directory) for module in _modules(directory))
    return next((folder for folder in folders if _has_weights(folder)), directory)


def _folder_of(module: dict[str, Any], directory: Path) -> Path:
    folder = directory / str(module.get("path") or ".")
    if not folder.resolve().is_relative_to(directory.resolve()):
        raise InputError(f"{directory / MODULES}: names {str(folder)!r}, which lies outside the model")
    return folder


def _has_weights(folder: Path) -> bool:
    return any((folder / name).exists() for file in (SAFETENSORS, PICKLE) for name in (file, f"{file}.index.json"))


def only_averages(directory: Path) -> bool:
    """Return whether modules.json names the rows of tokens and their mean, and nothing that computes more of them."""
    modules = _modules(directory)
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    if not kinds or kinds[0] not in STATIC or any(kind not in AVERAGING for kind in kinds[1:]):
        return False
    pooled = [_folder_of(module, directory) for module, kind in zip(modules, kinds, strict=True) if kind == "Pooling"]
    return all(_pooling(folder) <= {*MEANS} for folder in pooled)


def _pooling(folder: Path) -> set[str]:
    """Return the ways in which a module pools, by the configuration of this version of it or an earlier one."""
    path = folder / "config.json"
    said = _read(path, dict[str, Any]) if path.exists() else {}
    return {
        str(value) if value is not True else key
        for key, value in said.items()
        if key.startswith("pooling_mode") and value
    }


def _modules(directory: Path) -> list[dict[str, Any]]:
    return _read(directory / MODULES, list[dict[str, Any]]) if (directory / MODULES).exists() else []


def weights_in(directory: Path) -> tuple[Tensors, str | None]:
    """Open the tensors of a model directory; safetensors are preferred to pickles.

    Returns:
        The tensors, and a sentence about parts that are missing, None where there is no sign of that.

    Raises:
        InputError: there are no weights in it, a file is damaged, or one that the index names is missing when a tensor
            of it is asked for.
    """
    if (directory / SAFETENSORS).exists():
        return safetensors_in(_names_in([directory / SAFETENSORS])), None
    if files := files_of_index(directory, SAFETENSORS):
        return safetensors_in(files), None
    if found := sorted(directory.glob("*.safetensors")):
        return safetensors_in(_names_in(found)), parts_beside(found[0])[1]
    for name in (PICKLE, ADAPTER):
        if (directory / name).exists():
            return pickle_in(directory / name), None
    if files := files_of_index(directory, PICKLE):
        return pickles_in(files), None
    if (directory / ".metadata").exists():
        raise InputError(
            f"{directory}: a checkpoint in parts, of torch.distributed.checkpoint; make a file of it first: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {directory} model.pt"
        )
    beside = [path for folder in (directory, directory / "onnx") if folder.is_dir() for path in folder.iterdir()]
    others = sorted(
        path.relative_to(directory).as_posix()
        for path in beside
        if path.suffix in OTHER_FILES or (path.is_dir() and _has_weights(path))  # such as the routes of an encoder
    )
    hint = f"; name what to read of it: {', '.join(others[:5])}" if others else ""
    raise InputError(
        f"{directory}: no weights in it: neither a model of transformers ({SAFETENSORS} or {PICKLE}), nor a run of "
        f"coupled-adam train, nor an array{hint}"
    )


def weights_of_part(path: Path, pickled: bool) -> tuple[Tensors, str | None]:
    """Open the tensors of one file, and of the parts beside it, if it is one of several; as above."""
    parts, missing = parts_beside(path)
    return pickle_in(*parts) if pickled else safetensors_in(_names_in(parts)), missing


def _names_in(files: list[Path]) -> dict[str, Path]:
    return {name: path for path in files for name in safetensors_names(path)}


def files_of_index(directory: Path, name: str) -> dict[str, Path]:
    """Read the file of each tensor from the index of a model in several files; empty without an index."""
    path = directory / f"{name}.index.json"
    if not path.exists():
        return {}
    files = _read(path, dict[str, Any]).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InputError(f"{path}: no weight_map, so not the index of a sharded model")
    # A name with directories could lead out of the model.
    return {tensor: directory / Path(str(file)).name for tensor, file in files.items()}


def read_config(directory: Path) -> dict[str, Any] | None:
    """Read config.json as it is; None if there is none.

    Raises:
        InputError: it is damaged, also in one of the values that matter here.
    """
    path = directory / "config.json"
    if not path.exists():
        return None
    config = _read(path, dict[str, Any])
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: damaged (architectures: {str(names)[:60]} is not a list of names)")
    for part in (config, *_language_parts(config)):
        if not isinstance(tied := part.get(TIED), bool | None):
            raise InputError(f"{path}: damaged ({TIED}: {str(tied)[:60]} is neither true nor false)")
    return config


def base_of_adapter(directory: Path) -> str | None:
    """Return the name of the model that an adapter of PEFT belongs to; None if the directory holds no adapter."""
    config = read_adapter_config(directory)
    return None if config is None else str(config.get("base_model_name_or_path") or "which is not named")


def read_adapter_config(directory: Path) -> dict[str, Any] | None:
    """Read adapter_config.json as it is; None if there is none."""
    path = directory / "adapter_config.json"
    return _read(path, dict[str, Any]) if path.exists() else None


def _read(path: Path, schema: type[T]) -> T:
    check_downloaded(path)
    return read_json(path, schema)


def full_config(directory: Path) -> dict[str, Any] | None:
    """Read config.json with the defaults of its class in transformers; None if transformers has no such class.

    The class matters: Gemma 2 caps its logits where config.json does not mention it.
    """
    from transformers import AutoConfig

    try:
        found: dict[str, Any] = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        ).to_dict()
    except Exception:  # of every kind: an unknown model type, code of the model's own
        return None
    return found


def says_tied(directory: Path, config: dict[str, Any]) -> bool | None:
    """Return whether the configuration ties the embeddings; None if neither it nor its class says so or not."""
    # Multimodal models say it of the whole and of the language model, and one of the two may be a mere default.
    said = [part[TIED] for part in (config, *_language_parts(config)) if part.get(TIED) is not None]
    if not said:
        said = [value for value in [(full_config(directory) or {}).get(TIED)] if value is not None]
    return any(said) if said else None


def _language_parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for key in LANGUAGE_PARTS if isinstance(part := config.get(key), dict)]


def predicts(config: dict[str, Any]) -> bool | None:
    """Return whether the architecture is one with an output embedding; None if the configuration names none."""
    names = config.get("architectures")
    return any(PREDICTS.search(name) for name in names) if names else None


def words_in(directory: Path) -> tuple[Words | None, str | None]:
    """Return the words of the tokenizer in a model's directory, or None and a sentence about why there are none.

    The sentence is None too, if there is no tokenizer.

    Raises:
        InputError: a file of the tokenizer is damaged.
    """
    path = directory / "tokenizer.json"
    if path.exists():  # read by itself, it takes a tenth of the time that transformers takes
        with parsed(path, "damaged, or no tokenizer"):
            return words_of(Tokenizer.from_file(str(path))), None
    for name in WORD_LISTS:
        if (directory / name).exists():
            return _listed_words(directory / name), None
    present = [directory / name for name in TOKENIZER_FILES if (directory / name).exists()]
    if not present:
        return None, None
    for file in present:
        check_downloaded(file)
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of every kind: code of the model's own, a package that is not here
        return None, f"Its tokenizer could not be loaded, so words were left out ({one_line(error, 120)})."
    words = Words(
        {number: token for token, number in loaded.get_vocab().items()},
        functools.partial(loaded.encode, add_special_tokens=False),
        loaded.unk_token_id,
    )
    return words, None


def _listed_words(path: Path) -> Words:
    listed = _read(path, dict[str, Any]).get("vocab")
    if not isinstance(listed, list) or not all(isinstance(word, str) for word in listed):
        raise InputError(f"{path}: damaged (vocab is not a list of words)")
    index = {word: number for number, word in enumerate(listed)}

    def encode(text: str) -> list[int]:
        found = index.get(text, index.get(text.lower()))  # as these tokenizers look a word up
        return [] if found is None else [found]

    return Words({number: printable(word) for word, number in index.items()}, encode, None)


def from_hub(name: str) -> Path:
    """Fetch the files that the embeddings of a model on the Hugging Face hub need, and return their directory.

    Raises:
        InputError: there is no such model, or no network and no copy in the cache.
    """
    from huggingface_hub import snapshot_download

    def fetch(files: list[str]) -> Path:
        try:
            return Path(snapshot_download(name, allow_patterns=files))
        except Exception as error:  # of every kind, from the network to the name
            raise InputError(
                f"{name}: not found locally, and not available from the Hugging Face Hub ({one_line(error, 160)}). "
                f"Download it first (hf download {name}), or pass a local directory"
            ) from None

    directory = fetch(DESCRIPTION)
    if not files_of_index(directory, SAFETENSORS):
        directory = fetch([SAFETENSORS, "adapter_model.safetensors"])
        if any(directory.glob("*.safetensors")):
            return directory
    for index in (SAFETENSORS, PICKLE):
        if files := files_of_index(directory, index):
            return fetch(sorted({files[tensor].name for tensor in candidates(files) or files}))
    directory = fetch([PICKLE, ADAPTER])
    if any((directory / name).exists() for name in (PICKLE, ADAPTER)):
        return directory
    if modules := _modules(directory):
        folders = [path for module in modules if (path := module.get("path"))]
        needed = (*DESCRIPTION, *WORD_LISTS, SAFETENSORS, PICKLE)
        return fetch([f"{folder}/{file}" for folder in folders for file in needed])
    return fetch(["vocab/vectors*", "vocab/key2row", "vocab/strings.json"])  # a pipeline of spaCy
