"""The language models: a GPT-2 and a LLaMA without biases, to be read in one sitting."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from coupled_adam.lm.config import Model
from coupled_adam.lm.loss import TiedGradient, linear_cross_entropy, tied_embedding

#: θ of the rotary positions, and ε of RMSNorm, as LLaMA has them.
ROTARY_BASE, RMS_EPS = 10_000.0, 1e-5


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.heads = config.heads
        self.query_key_value = nn.Linear(config.width, 3 * config.width, bias=False)
        self.projection = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        """(batch, sequence, width) -> the same; ``rotation`` as of :func:`rotations`, None for no rotary positions."""
        batch, sequence, width = x.shape
        qkv = self.query_key_value(x).view(batch, sequence, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, sequence, width / heads)
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.projection(attended.transpose(1, 2).reshape(batch, sequence, width))  # type: ignore[no-any-return]


def rotations(length: int, size: int, device: torch.device) -> Tensor:
    """Cosines and sines of the rotary positions, (2, length, size): pair j at position t turns by t·base^(−2j/size)."""
    speeds = ROTARY_BASE ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), speeds).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()])


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs (j, j + size/2) of the last dimension of (…, sequence, size)."""
    cos, sin = rotation.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    turned: Tensor = x * cos + torch.cat([-second, first], dim=-1) * sin
    return turned


class Perceptron(nn.Module):
    """Two layers, or with a gate the SwiGLU of LLaMA."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden_width, bias=False) if config.family == "llama" else None
        self.expansion = nn.Linear(config.width, config.hidden_width, bias=False)
        self.projection = nn.Linear(config.hidden_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, width) -> the same."""
        if self.gate is not None:
            hidden = F.silu(self.gate(x)) * self.expansion(x)
        else:
            # The approximation of GELU that GPT-2 was trained with; transformers calls it "gelu_new".
            hidden = F.gelu(self.expansion(x), approximate="tanh")
        return self.projection(hidden)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and a perceptron, each normalised before and added to what it reads."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.perceptron_norm = make_norm(config)
        self.perceptron = Perceptron(config)

    def forward(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        """(batch, sequence, width) -> the same."""
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.perceptron(self.perceptron_norm(x))  # type: ignore[no-any-return]


def make_norm(config: Model) -> nn.Module:
    """LayerNorm or RMSNorm over the width, without bias."""
    if config.norm_name == "rmsnorm":
        return nn.RMSNorm(config.width, eps=RMS_EPS)
    return nn.LayerNorm(config.width, bias=False)


class LanguageModel(nn.Module):
    """Tokens in, scores of the next token out.

    Initialised as GPT-2: N(0, 0.02), residual projections by 1/√(2·layers) smaller.
    """

    def __init__(self, config: Model, vocabulary_size: int, sequence_length: int) -> None:
        super().__init__()
        self.config, self.activation_checkpointing = config, False
        self.token_embedding = nn.Embedding(vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(sequence_length, config.width) if config.family == "gpt2" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = make_norm(config)
        self.head = nn.Linear(config.width, vocabulary_size, bias=False)
        if config.tied:
            self.head.weight = self.token_embedding.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                shrink = math.sqrt(2 * config.layers) if name.endswith("projection.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / shrink)

    def get_output_embeddings(self) -> nn.Linear:
        """The head, under the name that transformers gives it."""
        return self.head

    def hidden(self, tokens: Tensor, tied: TiedGradient | None = None) -> Tensor:
        """(batch, sequence) token ids -> (batch, sequence, width), what the head reads; ``tied`` is for the loss."""
        weight, rotation = self.token_embedding.weight, None
        x = self.token_embedding(tokens) if tied is None else tied_embedding(tokens, weight, tied)
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[: tokens.shape[1]]
        else:
            rotation = rotations(tokens.shape[1], self.config.width // self.config.heads, tokens.device)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, use_reentrant=False)
            else:
                x = block(x, rotation)
        return self.final_norm(x)  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or the loss of ``targets``.

        The loss takes one backward pass, and reads a tied embedding past its module and the module's hooks.

        Args:
            tokens: ids, int64 (batch, sequence).
            targets: ids of the next tokens, of the same shape; None for logits.

        Returns:
            (batch, sequence, vocabulary), or the sum over all positions of the cross entropy in nats, a scalar.
        """
        if targets is None:
            return self.head(self.hidden(tokens))  # type: ignore[no-any-return]
        tied = TiedGradient() if self.config.tied else None
        hidden = self.hidden(tokens, tied).flatten(0, 1)
        return linear_cross_entropy(hidden, self.head.weight, targets.flatten(), tied)


def parameter_count(model: nn.Module) -> int:
    """Trainable numbers; a tied embedding counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def build_model(config: Model, vocabulary_size: int, sequence_length: int, seed: int) -> LanguageModel:
    """A model whose initial weights depend on ``seed`` alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguageModel(config, vocabulary_size, sequence_length)
