"""Which of a model's tensors are its embeddings, by the names that families of models give them."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from coupled_adam.audit.tensor_files import FLOATS, Tensors
from coupled_adam.errors import InputError

#: How the name of a token embedding ends.
INPUT = (
    "embed_tokens.weight",  # LLaMA, Mistral, Qwen, Gemma, OPT, BART; of a multimodal model, below its language_model
    "wte.weight",  # GPT-2, GPT-J, MPT
    "word_embeddings.weight",  # BERT, RoBERTa, BLOOM, Falcon
    "tok_embeddings.weight",  # ModernBERT, InternLM2, LLaMA as Meta published it
    "embed_in.weight",  # GPT-NeoX, Pythia
    "shared.weight",  # T5, BART
    "token_embd.weight",  # GGUF
    "token_embedding.weight",  # ours, the text side of CLIP
    "token_embeddings.weight",  # OpenELM
    "tokens_embed.weight",  # GPT
    "word_embedding.weight",  # XLNet
    "embeddings.weight",  # Mamba, RWKV in transformers, XLM
    "embedding.weight",  # Mamba as its authors published it, static embeddings
    "emb.weight",  # RWKV as its authors published it
    "emb_layer.weight",  # WordEmbeddings of sentence-transformers
)

#: How the name of an output embedding ends.
OUTPUT = (
    "lm_head.weight",
    "embed_out.weight",  # GPT-NeoX
    "cls.predictions.decoder.weight",  # BERT
    "lm_head.decoder.weight",  # RoBERTa
    "generator_lm_head.weight",  # ELECTRA
    "vocab_projector.weight",  # DistilBERT
    "output_projection.weight",  # BioGPT
    "output_layer.weight",  # ChatGLM
    "ff_out.weight",  # OLMo as its authors published it
    "lm_loss.weight",  # XLNet
    "head.weight",  # ours, RWKV
    "output.weight",  # GGUF, InternLM2, LLaMA as Meta published it
    "decoder.weight",  # ModernBERT
)

#: Names of a file that holds nothing but an embedding.
ALONE = ("embedding", "embeddings", "weight")


#: What PEFT puts into the name of a module that it trains as a whole, or that it adds an adapter to.
PEFT = re.compile(r"(?<=\.)(modules_to_save\.[^.]+|base_layer)\.(?=weight$)")

#: What packed or quantized forms keep in the place of a weight, or beside it: GPTQ, AWQ, MLX, bitsandbytes, fp8.
PACKED = re.compile(r"qweight|weight[._].+|scales?|biases|qzeros|g_idx|SCB|absmax")


def candidates(names: Iterable[str]) -> list[str]:
    """List the names among which the embeddings of a model are, with nothing known but names."""
    known = list(names)
    return [name for endings in (INPUT, OUTPUT) for name in next(_by_depth(known, endings), [])]


def find_input(tensors: Tensors) -> str | None:
    """Find the name of the token embedding; None if there is none that is known.

    The least deeply nested one counts: deeper ones belong to parts, such as a layer that predicts further ahead. Of
    several at one depth (the towers of a multimodal model) it is the one with most rows.
    """
    for group in _by_depth(tensors.files, INPUT):
        if matrices := [name for name in group if len(tensors.shape(name)) == 2]:
            return max(matrices, key=lambda name: tensors.shape(name)[0])
    for name in ALONE:
        if name in tensors.files and len(tensors.shape(name)) == 2:
            return name
    return None


def find_output(tensors: Tensors, rows: int | None = None, width: int | None = None) -> str | None:
    """Find the name of the output embedding; None if there is none.

    Args:
        rows, width: the shape of the token embedding. What differs in width, or has less than half its rows, is the
            head of a classifier or a layer within the model. A few rows more or less are padding.
    """
    for group in _by_depth(tensors.files, OUTPUT):
        for name in group:
            shape = tensors.shape(name)
            if len(shape) == 2 and width in (None, shape[1]) and (rows is None or 2 * shape[0] >= rows):
                return name
    return None


def find_packed_output(tensors: Tensors, found: str) -> str | None:
    """Find the name of an output embedding that is not stored as a matrix of numbers; None if there is none.

    Args:
        tensors: of the model.
        found: the name of its token embedding; heads are not more deeply nested than that.
    """
    depth, rows = plain_name(found).count("."), tensors.shape(found)[0]
    for stem in (ending.removesuffix(".weight") for ending in OUTPUT):
        pattern = re.compile(rf"(?:.+\.)?{re.escape(stem)}\.(.+)")
        for name in tensors.files:
            match = pattern.fullmatch(name)
            if match is None or name == found or name[: match.start(1)].count(".") > depth:
                continue
            if PACKED.fullmatch(match[1]):
                whole = name[: match.start(1)] + "weight"
                return whole if whole in tensors.files else name
            # The right number of rows, in numbers that are none.
            if match[1] == "weight" and tensors.shape(name)[0] == rows and tensors.stored(name).dtype not in FLOATS:
                return name
    return None


def has_adapter(name: str) -> bool:
    """Return whether a matrix is the base of an adapter, which adds something to it as the model runs."""
    return ".base_layer." in name


def plain_name(name: str) -> str:
    """Return the name that a tensor had before PEFT."""
    return PEFT.sub("", name)


def only_matrix(tensors: Tensors) -> str | None:
    """Return the name of the single 2-D tensor, if there is just one."""
    matrices = [name for name in tensors.files if len(tensors.shape(name)) == 2]
    return matrices[0] if len(matrices) == 1 else None


def none_found(source: str, tensors: Tensors) -> InputError:
    """Make the error for a model without a known embedding; it lists the matrices with the most rows."""
    known = any(len(tensors.shape(name)) == 2 for name in tensors.files)
    reason = "no tensor has a known embedding name; name one (--tensor)" if known else "no embedding"
    return InputError(f"{source}: {reason}: {largest_matrices(tensors)}")


def largest_matrices(tensors: Tensors) -> str:
    """List the matrices with the most rows, for an error that asks to name one."""
    shapes = {name: tensors.shape(name) for name in tensors.files}
    matrices = sorted((name for name in shapes if len(shapes[name]) == 2), key=lambda name: -shapes[name][0])
    if not matrices:
        return f"none of its tensors is a matrix ({_listed(list(shapes)[:5])})"
    listed = [f"{name} {shapes[name][0]:,} × {shapes[name][1]:,}" for name in matrices[:5]]
    return f"its matrices with the most rows are {_listed(listed)}"


def _by_depth(names: Collection[str], endings: Sequence[str]) -> Iterator[list[str]]:
    """Names with one of the endings: those of the lowest depth first, and among these in the order of the endings."""
    found: dict[int, list[str]] = {}
    for ending in endings:
        for name in names:
            plain = plain_name(name)
            if plain == ending or plain.endswith("." + ending):
                group = found.setdefault(plain.count("."), [])
                if name not in group:
                    group.append(name)
    return (found[depth] for depth in sorted(found))


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items) or "it is empty"
