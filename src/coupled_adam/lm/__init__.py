"""Language models: text in, checkpoints out."""

from coupled_adam.errors import require

require("lm", "numpy", "gensim", "tokenizers", "pydantic", "tomli_w", "filelock", "rich", "xxhash")
