"""The language models: a GPT-2 and a LLaMA without biases, to be read in one sitting."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.compiler import is_compiling
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

    def forward(self, x: Tensor, recompute: bool = False) -> Tensor:
        """(batch, sequence, width) -> the same."""
        inputs = [self.expansion(x)] if self.gate is None else [self.expansion(x), self.gate(x)]
        hidden = activated(*inputs)
        with recomputed(hidden, activated, *inputs, enabled=recompute):
            return self.projection(hidden)  # type: ignore[no-any-return]


def activated(expanded: Tensor, gate: Tensor | None = None) -> Tensor:
    """SwiGLU where there is a gate, else the approximation of GELU that GPT-2 was trained with ("gelu_new")."""
    return F.gelu(expanded, approximate="tanh") if gate is None else F.silu(gate) * expanded


def recomputed(
    result: Tensor, function: Callable[..., Tensor], *inputs: Tensor, enabled: bool
) -> AbstractContextManager[object]:
    """Where autograd keeps ``inputs`` in the place of ``result``, which is ``function(*inputs)`` and quickly computed.

    A compiler finds out for itself what to compute again.
    """
    if not enabled or is_compiling():
        return nullcontext()
    address, size = result.data_ptr(), result.numel()
    if address == 0:  # as that of a DTensor, whose parts have addresses of their own
        return nullcontext()

    def pack(saved: Tensor) -> torch.Size | tuple[Tensor, int]:
        if saved.data_ptr() == address and saved.numel() == size and saved.is_contiguous():
            return saved.shape
        # Detached: a node that holds its own output with its history would never be freed.
        return saved.detach(), saved._version

    def unpack(packed: torch.Size | tuple[Tensor, int]) -> Tensor:
        if isinstance(packed, torch.Size):
            return function(*inputs).view(packed)
        saved, version = packed
        if saved._version != version:  # autograd checks it only where there are no hooks
            raise RuntimeError("a tensor needed for the gradient has been modified in place since the forward pass")
        return saved

    return saved_tensors_hooks(pack, unpack)


class Block(nn.Module):
    """Attention and a perceptron, each normalised before and added to what it reads."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.perceptron_norm = make_norm(config)
        self.perceptron = Perceptron(config)

    def forward(self, x: Tensor, rotation: Tensor | None, recompute: bool = False) -> Tensor:
        """(batch, sequence, width) -> the same; with ``recompute`` less is kept for the backward pass."""
        normed = self.attention_norm(x)
        with recomputed(normed, self.attention_norm, x, enabled=recompute):
            x = x + self.attention(normed, rotation)
        normed = self.perceptron_norm(x)
        with recomputed(normed, self.perceptron_norm, x, enabled=recompute):
            return x + self.perceptron(normed, recompute)  # type: ignore[no-any-return]


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

    def hidden(self, tokens: Tensor, tied: TiedGradient | None = None, recompute: bool = False) -> Tensor:
        """(batch, sequence) token ids -> (batch, sequence, width), what the head reads.

        For the loss ``tied`` is what the head gets too, and ``recompute`` saves memory.
        """
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
                x = block(x, rotation, recompute and torch.is_grad_enabled())
        return self.final_norm(x)  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or the loss of ``targets``.

        Logits are plain autograd. The loss takes less memory and time: norms and activations are computed again in the
        backward pass, of which there can be one, and a tied embedding is read past its module and the module's hooks.

        Args:
            tokens: ids, int64 (batch, sequence).
            targets: ids of the next tokens, of the same shape; None for logits.

        Returns:
            (batch, sequence, vocabulary), or the sum over all positions of the cross entropy in nats, a scalar.
        """
        if targets is None:
            return self.head(self.hidden(tokens))  # type: ignore[no-any-return]
        tied = TiedGradient() if self.config.tied else None
        hidden = self.hidden(tokens, tied, recompute=True).flatten(0, 1)
        return linear_cross_entropy(hidden, self.head.weight, targets.flatten(), tied)


def parameter_count(model: nn.Module) -> int:
    """Trainable numbers; a tied embedding counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def build_model(config: Model, vocabulary_size: int, sequence_length: int, seed: int) -> LanguageModel:
    """A model whose initial weights depend on ``seed`` alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguageModel(config, vocabulary_size, sequence_length)
