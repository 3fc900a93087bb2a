"""Model directories as transformers writes them: which files hold the weights, and what the configuration says."""

import functools
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from coupled_adam.audit.embedding_names import candidates
from coupled_adam.audit.tensor_files import (
    Tensors,
    pickle_in,
    pickles_in,
    safetensors_in,
    safetensors_names,
)
from coupled_adam.errors import InputError, one_line
from coupled_adam.files import read_json
from coupled_adam.lm.words import Words, words_of

#: What is fetched of a model on the hub before its weights.
DESCRIPTION = ["config.json", "tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "*.model", "*.index.json"]

#: Architectures whose name says that they predict tokens. Others read them, and have no output embedding.
PREDICTS = re.compile(r"CausalLM|LMHead|MaskedLM|ConditionalGeneration|PreTraining|Seq2SeqLM")

#: Files of a tokenizer that transformers can put together.
TOKENIZER_FILES = ("tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")

#: The key of a configuration that ties the embeddings, and the parts of a multimodal model's that may have it too.
TIED, LANGUAGE_PARTS = "tie_word_embeddings", ("text_config", "language_config", "llm_config")

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"


def weights_in(directory: Path) -> Tensors:
    """Open the tensors of a model directory; safetensors are preferred to pickles.

    Raises:
        InputError: there are no weights in it, a file is damaged, or one that the index names is missing when a tensor
            of it is asked for.
    """
    if (directory / SAFETENSORS).exists():
        return safetensors_in(dict.fromkeys(safetensors_names(directory / SAFETENSORS), directory / SAFETENSORS))
    if files := files_of_index(directory, SAFETENSORS):
        return safetensors_in(files)
    if found := sorted(directory.glob("*.safetensors")):
        return safetensors_in({name: path for path in found for name in safetensors_names(path)})
    if (directory / PICKLE).exists():
        return pickle_in(directory / PICKLE)
    if files := files_of_index(directory, PICKLE):
        return pickles_in(files)
    others = sorted(p.name for p in directory.iterdir() if p.suffix in (".gguf", ".npy", ".npz", ".pt", ".pth", ".bin"))
    hint = f"; name the file to read: {', '.join(others[:5])}" if others else ""
    raise InputError(
        f"{directory}: no weights in it (neither safetensors, nor {PICKLE}, nor experiment.toml and checkpoints){hint}"
    )


def files_of_index(directory: Path, name: str) -> dict[str, Path]:
    """Read the file of each tensor from the index of a model in several files; empty without an index."""
    path = directory / f"{name}.index.json"
    if not path.exists():
        return {}
    files = read_json(path, dict[str, Any]).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InputError(f"{path}: no weight_map; it is no index of a model in several files")
    # A name with directories could lead out of the model.
    return {tensor: directory / Path(str(file)).name for tensor, file in files.items()}


def read_config(directory: Path) -> dict[str, Any] | None:
    """Read config.json as it is; None if there is none."""
    return read_json(directory / "config.json", dict[str, Any]) if (directory / "config.json").exists() else None


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
    parts = [config, *(part for key in LANGUAGE_PARTS if isinstance(part := config.get(key), dict))]
    said = [part[TIED] for part in parts if part.get(TIED) is not None]
    if not said:
        said = [value for value in [(full_config(directory) or {}).get(TIED)] if value is not None]
    return any(said) if said else None


def has_no_head(config: dict[str, Any]) -> bool:
    """Return whether the architecture is one that has no output embedding, such as a sentence encoder."""
    architectures = config.get("architectures") or []
    return bool(architectures) and not any(PREDICTS.search(str(name)) for name in architectures)


def words_in(directory: Path) -> Words | None:
    """Return the words of the tokenizer in a model's directory; None if there is none, or none that works here.

    Raises:
        InputError: tokenizer.json is damaged.
    """
    path = directory / "tokenizer.json"
    if path.exists():  # read by itself, it takes a tenth of the time that transformers takes
        try:
            return words_of(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises nothing more specific
            raise InputError(f"{path}: damaged, or no tokenizer ({one_line(error, 120)})") from None
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception:  # of every kind: code of the model's own, a package that is not here; the figures do without
        return None
    return Words(
        {number: token for token, number in loaded.get_vocab().items()},
        functools.partial(loaded.encode, add_special_tokens=False),
        loaded.unk_token_id,
    )


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
                f"{name}: no such file or directory, and not available from the Hugging Face hub "
                f"({one_line(error, 160)}); where there is a network: hf download {name}; or give a model's directory"
            ) from None

    directory = fetch(DESCRIPTION)
    if not files_of_index(directory, SAFETENSORS):
        directory = fetch([SAFETENSORS])
        if (directory / SAFETENSORS).exists():
            return directory
    for index in (SAFETENSORS, PICKLE):
        if files := files_of_index(directory, index):
            return fetch(sorted({files[tensor].name for tensor in candidates(files) or files}))
    return fetch([PICKLE])
