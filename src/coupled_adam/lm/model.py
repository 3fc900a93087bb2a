"""GPT-2 without biases: the whole model, to be read in one sitting."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coupled_adam.lm.config import Model

#: Positions whose logits exist at a time: (positions, vocabulary) in all would be the largest tensor of the step.
LOSS_CHUNK = 128


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, width) -> the same."""
        batch, sequence, width = x.shape
        qkv = self.query_key_value(x).view(batch, sequence, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, sequence, width / heads)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.projection(attended.transpose(1, 2).reshape(batch, sequence, width))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and a two-layer perceptron, each normalised before and added to what it reads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, heads)
        self.perceptron_norm = nn.LayerNorm(width, bias=False)
        self.expansion = nn.Linear(width, 4 * width, bias=False)
        self.projection = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, width) -> the same."""
        x = x + self.attention(self.attention_norm(x))
        # The approximation of GELU that GPT-2 was trained with; transformers calls it "gelu_new".
        hidden = F.gelu(self.expansion(self.perceptron_norm(x)), approximate="tanh")
        return x + self.projection(hidden)  # type: ignore[no-any-return]


class LanguageModel(nn.Module):
    """Tokens in, scores of the next token out. The token embedding is also the output head.

    Initialised as GPT-2: N(0, 0.02), residual projections by 1/√(2·layers) smaller.
    """

    def __init__(self, config: Model, vocabulary_size: int, sequence_length: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(sequence_length, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, vocabulary_size, bias=False)
        self.head.weight = self.token_embedding.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                shrink = math.sqrt(2 * config.layers) if name.endswith("projection.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / shrink)

    def get_output_embeddings(self) -> nn.Linear:
        """The head, under the name that transformers gives it."""
        return self.head

    def hidden(self, tokens: Tensor) -> Tensor:
        """(batch, sequence) token ids -> (batch, sequence, width), what the head reads."""
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, sequence) token ids -> logits (batch, sequence, vocabulary)."""
        return self.head(self.hidden(tokens))  # type: ignore[no-any-return]

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Sum of the cross entropy in nats over all (batch, sequence) positions, a scalar."""
        hidden = self.hidden(tokens).flatten(0, 1)
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=LOSS_CHUNK)
        return F.linear_cross_entropy(hidden, self.head.weight, targets.flatten(), reduction="sum", options=options)


def parameter_count(model: nn.Module) -> int:
    """Trainable numbers; a tied embedding counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def build_model(config: Model, vocabulary_size: int, sequence_length: int, seed: int) -> LanguageModel:
    """A model whose initial weights depend on ``seed`` alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguageModel(config, vocabulary_size, sequence_length)
