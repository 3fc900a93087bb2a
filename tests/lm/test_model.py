"""The models: against those of transformers, with the same weights; and what training options may not change."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from coupled_adam.lm.config import Loss, Model
from coupled_adam.lm.masking import IGNORED
from coupled_adam.lm.model import LanguageModel, build_model, parameter_count

VOCABULARY, LENGTH = 96, 12


def model(**settings) -> LanguageModel:
    network = build_model(Model(n_layers=2, n_heads=2, hidden_size=16, **settings), VOCABULARY, LENGTH, seed=0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return network


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize(("gelu", "theirs_called"), [("tanh", "gelu_new"), ("exact", "gelu")])
def test_gpt2_is_that_of_transformers_without_biases(gelu: str, theirs_called: str) -> None:
    ours = model(gelu=gelu)
    peer = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=16,
            n_layer=2,
            n_head=2,
            activation_function=theirs_called,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    ).eval()
    for name, p in peer.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
    inner = peer.transformer
    inner.wte.weight.copy_(ours.token_embedding.weight)
    inner.wpe.weight.copy_(ours.position_embedding.weight)
    inner.ln_f.weight.copy_(ours.final_norm.weight)
    for theirs, block in zip(inner.h, ours.blocks, strict=True):
        theirs.ln_1.weight.copy_(block.attention_norm.weight)
        theirs.ln_2.weight.copy_(block.mlp_norm.weight)
        theirs.attn.c_attn.weight.copy_(block.attention.qkv.weight.T)
        theirs.attn.c_proj.weight.copy_(block.attention.proj.weight.T)
        theirs.mlp.c_fc.weight.copy_(block.mlp.fc.weight.T)
        theirs.mlp.c_proj.weight.copy_(block.mlp.proj.weight.T)
    torch.testing.assert_close(ours(tokens()), peer(tokens()).logits, rtol=1e-5, atol=1e-5)
    other = model(gelu="exact" if gelu == "tanh" else "tanh")
    assert (other(tokens()) - peer(tokens()).logits).abs().max() > 5e-5, "the two are told apart"


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_llama_is_that_of_transformers(tied: bool) -> None:
    ours = model(family="llama", tied=tied)
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=ours.config.intermediate_size,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
        )
    ).eval()
    peer.model.embed_tokens.weight.copy_(ours.token_embedding.weight)
    peer.lm_head.weight.copy_(ours.head.weight)
    peer.model.norm.weight.copy_(ours.final_norm.weight)
    for theirs, block in zip(peer.model.layers, ours.blocks, strict=True):
        theirs.input_layernorm.weight.copy_(block.attention_norm.weight)
        theirs.post_attention_layernorm.weight.copy_(block.mlp_norm.weight)
        q, k, v = block.attention.qkv.weight.chunk(3)
        for projection, weight in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
            getattr(theirs.self_attn, projection).weight.copy_(weight)
        theirs.self_attn.o_proj.weight.copy_(block.attention.proj.weight)
        theirs.mlp.gate_proj.weight.copy_(block.mlp.gate.weight)
        theirs.mlp.up_proj.weight.copy_(block.mlp.fc.weight)
        theirs.mlp.down_proj.weight.copy_(block.mlp.proj.weight)
    torch.testing.assert_close(ours(tokens()), peer(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_modernbert_is_that_of_transformers_and_so_are_its_gradients(tied: bool) -> None:
    ours = model(family="modernbert", tied=tied)
    assert ours.head.bias is not None and ours.head.bias.any()
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    config = ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=ours.config.intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        layer_types=["full_attention"] * 2,
        rope_parameters={"full_attention": rope, "sliding_attention": rope},
        tie_word_embeddings=tied,
        pad_token_id=None,
    )
    peer = ModernBertForMaskedLM(config).eval()
    pairs = [
        (peer.model.embeddings.tok_embeddings, ours.token_embedding),
        (peer.model.embeddings.norm, ours.embedding_norm),
        (peer.model.final_norm, ours.final_norm),
        (peer.head.dense, ours.transform.dense),
        (peer.head.norm, ours.transform.norm),
        (peer.decoder, ours.head),
    ]
    for theirs, block in zip(peer.model.layers, ours.blocks, strict=True):
        pairs += [(theirs.attn.Wqkv, block.attention.qkv), (theirs.attn.Wo, block.attention.proj)]
        pairs += [(theirs.mlp_norm, block.mlp_norm), (theirs.mlp.Wo, block.mlp.proj)]
    pairs.append((peer.model.layers[1].attn_norm, ours.blocks[1].attention_norm))
    with torch.no_grad():
        for theirs, mine in pairs:
            theirs.weight.copy_(mine.weight)
        peer.decoder.bias.copy_(ours.head.bias)
        for theirs, block in zip(peer.model.layers, ours.blocks, strict=True):
            theirs.mlp.Wi.weight.copy_(torch.cat([block.mlp.gate.weight, block.mlp.fc.weight]))
    torch.testing.assert_close(ours(tokens()), peer(tokens()).logits, rtol=1e-5, atol=1e-5)
    later = tokens()
    later[:, -1] += 1
    assert not torch.equal(ours(later % VOCABULARY)[:, 0], ours(tokens())[:, 0]), "attention is to both sides"
    labels = tokens(2).masked_fill(tokens(3) > VOCABULARY // 5, IGNORED)
    losses = ours(tokens(1), labels)
    losses.total.backward()
    peer(tokens(1), labels=labels).loss.backward()
    count = (labels != IGNORED).sum()
    for theirs, mine in pairs:
        torch.testing.assert_close(mine.weight.grad / count, theirs.weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.head.bias.grad / count, peer.decoder.bias.grad, rtol=1e-4, atol=1e-6)


def gradients(network: LanguageModel) -> list[Tensor]:
    network.zero_grad()
    network(tokens(1), tokens(2)).total.backward()
    return [p.grad for p in network.parameters()]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("qkv", "shape"), [("split", (16, 16)), ("heads", (2, 8, 16))])
def test_separate_queries_keys_and_values_are_the_same_function(qkv: str, shape: tuple, family: str) -> None:
    settings = {"n_layers": 2, "n_heads": 2, "hidden_size": 16, "family": family, "qk_norm": True}
    fused, parted = (build_model(Model(**settings, qkv=how), VOCABULARY, LENGTH, 0) for how in ("fused", qkv))
    assert torch.equal(parted(tokens()), fused(tokens()))
    of_fused, of_parted = ({name: p.grad for name, p in n.named_parameters()} for n in (fused, parted) if gradients(n))
    for i in range(2):
        whole, prefix = of_fused.pop(f"blocks.{i}.attention.qkv.weight"), f"blocks.{i}.attention.qkv"
        parts = [of_parted.pop(f"{prefix}.{name}") for name in "qkv"]
        assert all(part.shape == shape for part in parts)
        assert torch.equal(torch.cat([part.flatten(0, -2) for part in parts]), whole)
    assert of_parted.keys() == of_fused.keys() and all(torch.equal(of_parted[n], of_fused[n]) for n in of_fused)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build_model(Model(**settings, qkv=qkv), VOCABULARY, LENGTH, 0)
    assert torch.equal(torch.rand(1), expected), "the global random state is left alone"


@pytest.mark.parametrize("family", ["gpt2", "llama", "modernbert"])
def test_activation_checkpointing_changes_nothing(family: str) -> None:
    network = model(family=family)
    expected = gradients(network)
    network.activation_checkpointing = True
    for found, grad in zip(gradients(network), expected, strict=True):
        torch.testing.assert_close(found, grad)


@pytest.mark.parametrize(
    ("family", "qkv"), [("gpt2", "fused"), ("llama", "fused"), ("modernbert", "fused"), ("gpt2", "heads")]
)
def test_compiled_blocks_compute_the_same(family: str, qkv: str) -> None:
    network = model(family=family, qkv=qkv)
    expected = gradients(network)
    for block in network.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for found, grad in zip(gradients(network), expected, strict=True):
        torch.testing.assert_close(found, grad)


@pytest.mark.parametrize("settings", [{}, {"qk_norm": True}, {"qk_norm": True, "norm": "layernorm"}])
def test_autocast_computes_nearly_the_same_loss(settings) -> None:
    network = model(family="llama", **settings)
    expected = network(tokens(1), tokens(2)).total
    with torch.autocast("cpu", torch.bfloat16):
        found = network(tokens(1), tokens(2)).total
    assert found.item() == pytest.approx(expected.item(), rel=2e-2)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_normalized_queries_and_keys_have_one_length_in_every_head(family: str, norm: str) -> None:
    def stretched(qk_norm: bool) -> Tensor:
        network = model(family=family, norm=norm, qk_norm=qk_norm)
        before = network(tokens())
        for block in network.blocks:
            block.attention.qkv.weight[:8] *= 100  # queries of the first head
            block.attention.qkv.weight[24:32] *= 100  # keys of the second
        return (network(tokens()) - before).abs().max()

    assert stretched(qk_norm=True) < 0.05 * stretched(qk_norm=False), "but for the ε of the norms"
    names = [name for name, _ in model(family=family, qk_norm=True).named_parameters() if "q_norm" in name]
    assert names == ["blocks.0.attention.q_norm.weight", "blocks.1.attention.q_norm.weight"]


def test_logits_are_those_of_the_loss() -> None:
    network = build_model(Model(logits="bfloat16"), VOCABULARY, LENGTH, seed=0, loss=Loss(softcap=0.5, z_loss=1e-4))
    logits, losses = network(tokens(1)), network(tokens(1), tokens(2))
    assert logits.abs().max() < 0.5 and logits.std() > 0.1
    expected = F.cross_entropy(logits.flatten(0, 1), tokens(2).flatten(), reduction="sum")
    torch.testing.assert_close(losses.cross_entropy, expected.detach())
    assert losses.total > losses.cross_entropy


@pytest.mark.parametrize(("multiple", "width"), [(128, 256), (32, 192), (1, 171)])
def test_the_width_of_swiglu_is_rounded_up(multiple: int, width: int) -> None:
    assert Model(family="llama", hidden_size=64, mlp_multiple=multiple).intermediate_size == width


def test_an_untied_head_is_a_matrix_of_its_own() -> None:
    tied, untied = model(), model(tied=False)
    assert parameter_count(untied) == parameter_count(tied) + VOCABULARY * 16
    assert untied.get_output_embeddings().weight is not untied.token_embedding.weight
