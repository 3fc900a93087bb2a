"""Model folders as transformers writes them: which files hold the weights, and what the configuration says."""

import json
import re
from pathlib import Path
from typing import Any

from coupled_adam.errors import InputError
from coupled_adam.evaluation.embedding_names import candidates
from coupled_adam.evaluation.tensor_files import (
    Tensors,
    pickle_in,
    pickles_in,
    safetensors_in,
    safetensors_names,
)

#: What is fetched of a model on the hub before its weights.
DESCRIPTION = ["config.json", "tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "*.model", "*.index.json"]

#: Architectures whose name says that they predict tokens. Others read them, and have no output embedding.
PREDICTS = re.compile(r"CausalLM|LMHead|MaskedLM|ConditionalGeneration|PreTraining|Seq2SeqLM")

#: The key of a configuration that ties the embeddings, and the parts of a multimodal model's that may have it too.
TIED, LANGUAGE_PARTS = "tie_word_embeddings", ("text_config", "language_config", "llm_config")

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"


def weights_in(folder: Path) -> Tensors:
    """The tensors of a model folder; safetensors are preferred to pickles.

    Raises:
        InputError: there are no weights in it, a file is damaged, or one that the index names is missing when a tensor
            of it is asked for.
    """
    if (folder / SAFETENSORS).exists():
        return safetensors_in(dict.fromkeys(safetensors_names(folder / SAFETENSORS), folder / SAFETENSORS))
    if files := files_of_index(folder, SAFETENSORS):
        return safetensors_in(files)
    if found := sorted(folder.glob("*.safetensors")):
        return safetensors_in({name: path for path in found for name in safetensors_names(path)})
    if (folder / PICKLE).exists():
        return pickle_in(folder / PICKLE)
    if files := files_of_index(folder, PICKLE):
        return pickles_in(files)
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".gguf", ".npy", ".npz", ".pt", ".pth", ".bin"))
    hint = f"; name the file to read: {', '.join(others[:5])}" if others else ""
    raise InputError(
        f"{folder}: no weights in it (neither safetensors, nor {PICKLE}, nor experiment.toml and checkpoints){hint}"
    )


def files_of_index(folder: Path, name: str) -> dict[str, Path]:
    """The file of each tensor of a model in several files, as its index has it; empty without an index."""
    path = folder / f"{name}.index.json"
    if not path.exists():
        return {}
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InputError(f"{path}: no weight_map; it is no index of a model in several files")
    # A name with folders could lead out of the model.
    return {tensor: folder / Path(str(file)).name for tensor, file in files.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError if the file does not hold one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object")
    return content


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json, as it is; None if there is none."""
    return read_json(folder / "config.json") if (folder / "config.json").exists() else None


def full_config(folder: Path) -> dict[str, Any] | None:
    """config.json with the defaults of its class in transformers; None if transformers has no such class.

    The class matters: Gemma 2 caps its logits where config.json does not mention it.
    """
    from transformers import AutoConfig

    try:
        found: dict[str, Any] = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ).to_dict()
    except Exception:  # of every kind: an unknown model type, code of the model's own
        return None
    return found


def says_tied(folder: Path, config: dict[str, Any]) -> bool | None:
    """What the configuration says of the embeddings; None if neither it nor its class says anything."""
    # Multimodal models say it of the whole and of the language model, and one of the two may be a mere default.
    parts = [config, *(part for key in LANGUAGE_PARTS if isinstance(part := config.get(key), dict))]
    said = [part[TIED] for part in parts if part.get(TIED) is not None]
    if not said:
        said = [value for value in [(full_config(folder) or {}).get(TIED)] if value is not None]
    return any(said) if said else None


def has_no_head(config: dict[str, Any]) -> bool:
    """Whether the architecture is one that has no output embedding, such as a sentence encoder."""
    architectures = config.get("architectures") or []
    return bool(architectures) and not any(PREDICTS.search(str(name)) for name in architectures)


def from_hub(name: str) -> Path:
    """The folder in the cache of a model on the Hugging Face hub, with the files that its embeddings need.

    Raises:
        InputError: there is no such model, or no network and no copy in the cache.
    """
    from huggingface_hub import snapshot_download

    def fetch(files: list[str]) -> Path:
        try:
            return Path(snapshot_download(name, allow_patterns=files))
        except Exception as error:  # of every kind, from the network to the name
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise InputError(
                f"{name}: no such file or folder, nor to be had from the Hugging Face hub ({reason}); where there is a "
                f"network: hf download {name}; or give the folder of a model"
            ) from None

    folder = fetch(DESCRIPTION)
    if not files_of_index(folder, SAFETENSORS):
        folder = fetch([SAFETENSORS])
        if (folder / SAFETENSORS).exists():
            return folder
    for index in (SAFETENSORS, PICKLE):
        if files := files_of_index(folder, index):
            return fetch(sorted({files[tensor].name for tensor in candidates(files) or files}))
    return fetch([PICKLE])
