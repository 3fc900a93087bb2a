"""The language models: GPT-2, LLaMA and ModernBERT without biases in their blocks, to be read in one sitting."""

import math
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from coupled_adam.lm.config import Loss, Model
from coupled_adam.lm.loss import Losses, TiedGradient, head_logits, linear_cross_entropy, tied_embedding
from coupled_adam.lm.masking import IGNORED

#: θ of the rotary positions, and ε of RMSNorm, as LLaMA has them.
ROTARY_BASE, RMS_EPS = 10_000.0, 1e-5


class Attention(nn.Module):
    """Self-attention with several heads: causal, or of a masked language model to both sides."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.n_heads, self.causal = config.n_heads, not config.masked
        size = config.hidden_size // config.n_heads
        self.q_norm, self.k_norm = (make_norm(config, size) if config.qk_norm else nn.Identity() for _ in range(2))
        self.qkv: nn.Module = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def split(self, config: Model) -> None:
        """Make the fused weight of queries, keys and values the parameters that ``config.qkv`` asks for."""
        fused, size = self.qkv.weight, config.hidden_size
        assert isinstance(fused, Tensor)
        per_head = (config.n_heads, size // config.n_heads, size)
        self.qkv = SplitProjection(fused, per_head if config.qkv == "heads" else (size, size))

    def forward(self, x: Tensor, rope: Tensor | None) -> Tensor:
        """(batch, sequence, hidden_size) -> the same; ``rope`` of ``rope_cache``, None without rotary positions."""
        batch, sequence, size = x.shape
        qkv = self.qkv(x).view(batch, sequence, 3, self.n_heads, size // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, sequence, size / heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(attended.transpose(1, 2).reshape(batch, sequence, size))  # type: ignore[no-any-return]


class SplitProjection(nn.Module):
    """What a fused projection to queries, keys and values computes, with parameters for each of the three."""

    def __init__(self, fused: Tensor, shape: tuple[int, ...]) -> None:
        """Take the values of the fused weight, (3·M, N); ``shape`` of each part, (M, N) or batches of matrices."""
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(part.detach().clone().view(shape)) for part in fused.chunk(3))

    def forward(self, x: Tensor) -> Tensor:
        """(…, N) -> (…, 3·M), by one product, as the fused projection."""
        return F.linear(x, torch.cat([part.flatten(0, -2) for part in (self.q, self.k, self.v)]))


def rope_cache(length: int, size: int, device: torch.device) -> Tensor:
    """Return cosines and sines of the rotary positions, (2, length, size): pair j at t rotates by t·base^(−2j/size)."""
    speeds = ROTARY_BASE ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), speeds).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()])


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the pairs (j, j + size/2) of the last dimension of (…, sequence, size)."""
    cos, sin = rope.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    rotated: Tensor = x * cos + torch.cat([-second, first], dim=-1) * sin
    return rotated


class MLP(nn.Module):
    """Two layers, or with a gate the SwiGLU of LLaMA or the GeGLU of ModernBERT."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate = nn.Linear(size, inner, bias=False) if config.family != "gpt2" else None
        self.fc = nn.Linear(size, inner, bias=False)
        self.proj = nn.Linear(inner, size, bias=False)
        self.approximate = "tanh" if config.family == "gpt2" and config.gelu == "tanh" else "none"
        self.silu = config.family == "llama"

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, hidden_size) -> the same."""
        inner = self.fc(x) if self.gate is None else self.gate(x)
        activated = F.silu(inner) if self.silu else F.gelu(inner, approximate=self.approximate)
        return self.proj(activated if self.gate is None else activated * self.fc(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and an MLP, each with a norm before it and a residual connection around it."""

    def __init__(self, config: Model, first: bool) -> None:
        super().__init__()
        # The embeddings of a ModernBERT are normalized already.
        normalized = first and config.masked
        self.attention_norm = nn.Identity() if normalized else make_norm(config, config.hidden_size)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config, config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Tensor | None) -> Tensor:
        """(batch, sequence, hidden_size) -> the same."""
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


def make_norm(config: Model, size: int) -> nn.Module:
    """Make a LayerNorm or RMSNorm over ``size`` components, without bias."""
    if config.norm_name == "rmsnorm":
        return nn.RMSNorm(size, eps=RMS_EPS)
    return nn.LayerNorm(size, bias=False)


class Transform(nn.Module):
    """What stands between the blocks of a masked language model and its head."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.norm = make_norm(config, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, hidden_size) -> the same."""
        return self.norm(F.gelu(self.dense(x)))  # type: ignore[no-any-return]


class LanguageModel(nn.Module):
    """A transformer: tokens in, logits of the next token out; or those of the token itself, if some are masked.

    Weights are initialized as in GPT-2: N(0, 0.02²), residual projections smaller by 1/√(2·layers), and a bias of 0.

    Args:
        config: the architecture.
        vocab_size: V, rows of the embedding.
        sequence_length: largest number of tokens.
        loss: terms in addition to the cross entropy; None for none.
    """

    def __init__(self, config: Model, vocab_size: int, sequence_length: int, loss: Loss | None = None) -> None:
        super().__init__()
        self.config, self.loss, self.activation_checkpointing = config, loss or Loss(), False
        self.token_embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(sequence_length, config.hidden_size) if config.family == "gpt2" else None
        size = config.hidden_size
        self.embedding_norm = make_norm(config, size) if config.masked else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, first=i == 0) for i in range(config.n_layers))
        self.final_norm = make_norm(config, size)
        self.transform = Transform(config) if config.masked else nn.Identity()
        self.head = nn.Linear(size, vocab_size, bias=config.masked)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)
        if config.tied:
            self.head.weight = self.token_embedding.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                shrink = math.sqrt(2 * config.n_layers) if name.endswith("proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / shrink)
        if config.qkv != "fused":  # at the end: the random numbers are those of the fused weights
            for attention in [module for module in self.modules() if isinstance(module, Attention)]:
                attention.split(config)

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head, under the name that transformers gives it."""
        return self.head

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embedding, under the name that transformers gives it."""
        return self.token_embedding

    def hidden(self, tokens: Tensor, tied: TiedGradient | None = None) -> Tensor:
        """(batch, sequence) token IDs -> (batch, sequence, hidden_size), the head's input; ``tied`` is for the loss."""
        weight, rope = self.token_embedding.weight, None
        x = self.token_embedding(tokens) if tied is None else tied_embedding(tokens, weight, tied)
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[: tokens.shape[1]]
        else:
            x = self.embedding_norm(x)
            rope = rope_cache(tokens.shape[1], self.config.hidden_size // self.config.n_heads, tokens.device)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope)
        return self.transform(self.final_norm(x))  # type: ignore[no-any-return]

    @overload
    def forward(self, tokens: Tensor, targets: None = None) -> Tensor: ...

    @overload
    def forward(self, tokens: Tensor, targets: Tensor) -> Losses: ...

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor | Losses:
        """Compute logits, or the loss of ``targets``.

        The loss takes one backward pass, and reads a tied embedding past its module and the module's hooks.

        Args:
            tokens: IDs, int64 (batch, sequence).
            targets: IDs to predict, of the same shape: the next tokens, or of a masked language model the tokens that
                were there, and ``IGNORED`` where nothing is to be predicted. None for logits.

        Returns:
            (batch, sequence, vocabulary), capped and rounded as the experiment says; or sums over all positions with a
            target: what is minimized, the cross entropy in nats, and where gradients are off what the logits are like.
        """
        weight, bias, cap, rounding = self.head.weight, self.head.bias, self.loss.softcap, self.config.logits
        if targets is None:
            hidden = self.hidden(tokens)
            if cap is None and rounding is None:
                return self.head(hidden)  # type: ignore[no-any-return]  # the module has the hooks of tensor parallelism
            return head_logits(hidden, weight, cap, rounding, bias)
        tied = TiedGradient() if self.config.tied else None
        hidden, targets = self.hidden(tokens, tied).flatten(0, 1), targets.flatten()
        if self.config.masked:
            wanted = targets != IGNORED
            hidden, targets = hidden[wanted], targets[wanted]
        return linear_cross_entropy(
            hidden,
            weight,
            targets,
            tied,
            bias=bias,
            z_loss=self.loss.z_loss,
            mu_loss=self.loss.mu_loss,
            softcap=cap,
            logits=rounding,
        )


def parameter_count(model: nn.Module) -> int:
    """Count trainable parameters; a tied embedding counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def build_model(
    config: Model, vocab_size: int, sequence_length: int, seed: int, loss: Loss | None = None
) -> LanguageModel:
    """Build a model whose initial weights depend on ``seed`` alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguageModel(config, vocab_size, sequence_length, loss)
