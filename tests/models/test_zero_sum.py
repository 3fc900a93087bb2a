"""Which matrices can be coupled: every row of the tables of docs/coupling.md, on models and losses that people train.

A loss that does not depend on the mean of a matrix's rows has gradients that sum to zero over the rows, and the other
way round. So three things are asked of every case: the sum, the loss after all rows have been shifted, and whether the
mean moves in steps of Coupled Adam.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from coupled_adam import CoupledAdam, param_groups
from coupled_adam.geometry import mean_shift_ratio

PAGE = Path(__file__).parents[2] / "docs" / "coupling.md"

ROWS, WIDTH, POSITIONS = 30, 8, 40
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}

Loss = Callable[[], Tensor]


class Case(NamedTuple):
    matrices: Sequence[Tensor]
    """To be coupled, (V, H) each."""
    loss: Loss
    """Computes the same loss again, for other values of the matrices."""
    rounding: float = 1e-12
    """What is left of a zero sum; models that compute a softmax in float32, whatever they are given, have more."""


FLOAT32 = 1e-5

#: By the first cell of its row: what the second says, and what it says it of.
TABLE: dict[str, tuple[str, list[Callable[[], Case]]]] = {}


def row(matrix: str, zero_sum: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Say which row of the page a case belongs to."""

    def enter(case: Callable[[], Case]) -> Callable[[], Case]:
        said, cases = TABLE.setdefault(matrix, (zero_sum, []))
        assert said == zero_sum
        cases.append(case)
        return case

    return enter


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def transformer(name: str, config: str, **options: object) -> nn.Module:
    """A tiny model with random weights, large enough for its logits to differ."""
    configuration = getattr(transformers, config)(initializer_range=0.5, **options)
    return getattr(transformers, name)(configuration).double().eval()


def llama(**options: object) -> nn.Module:
    return transformer("LlamaForCausalLM", "LlamaConfig", vocab_size=ROWS, **SIZES, **options)


def tokens() -> Tensor:
    return torch.randint(ROWS, (4, 12))


def matrix(rows: int = ROWS, width: int = WIDTH) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, width))


def coupled(model: nn.Module, **options: object) -> list[Tensor]:
    return [p for g in param_groups(model, **options) if g.get("second_moment") == "vocabulary" for _, p in g["params"]]


# ----------------------------------------------------------------------------------- a head, and what is made of logits


def on_a_head(loss_of: Callable[[Tensor, Tensor], Tensor], **options: object) -> Case:
    """A loss of the logits (N, V) and labels (N,) of a language model."""
    model, text = llama(**options), tokens()
    return Case(coupled(model), lambda: loss_of(model(text).logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()))


@row("head of a language model, cross entropy", "yes")
def plain() -> Case:
    return on_a_head(F.cross_entropy)


@row("head of a language model, cross entropy", "yes")
def with_a_bias() -> Case:
    model = nn.Sequential(nn.Embedding(ROWS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, ROWS))
    text = torch.randint(ROWS, (POSITIONS,))
    return Case([model[2].weight], lambda: F.cross_entropy(model(text[:-1]), text[1:]))


@row("head of a language model, cross entropy", "yes")
def padded_vocabulary() -> Case:
    padding = torch.zeros(ROWS).masked_fill(torch.arange(ROWS) >= ROWS - 3, -torch.inf)
    return on_a_head(lambda logits, labels: F.cross_entropy(logits + padding, labels.clamp(max=ROWS - 4)))


@row("… with label smoothing, class weights, ignored positions", "yes")
def smoothed() -> Case:
    return on_a_head(lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=0.1))


@row("… with label smoothing, class weights, ignored positions", "yes")
def weighted() -> Case:
    weight = torch.rand(ROWS)
    return on_a_head(lambda logits, labels: F.cross_entropy(logits, labels, weight))


@row("… with label smoothing, class weights, ignored positions", "yes")
def ignored() -> Case:
    return on_a_head(lambda logits, labels: F.cross_entropy(logits, labels, ignore_index=labels[0].item()))


@row("… other losses of its log-probabilities: focal, distillation, DPO, policy gradient, CTC", "yes")
def focal() -> Case:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        log_p = -F.cross_entropy(logits, labels, reduction="none")
        return -((1 - log_p.exp()) ** 2 * log_p).mean()  # Lin et al. 2017, arXiv 1708.02002

    return on_a_head(loss)


@row("… other losses of its log-probabilities: focal, distillation, DPO, policy gradient, CTC", "yes")
def distillation() -> Case:
    teacher = torch.randn(ROWS).softmax(0)
    return on_a_head(lambda logits, _: F.cross_entropy(logits, teacher.expand_as(logits)))


@row("… other losses of its log-probabilities: focal, distillation, DPO, policy gradient, CTC", "yes")
def preferences() -> Case:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        chosen, rejected = -F.cross_entropy(logits, labels, reduction="none").view(2, -1).sum(1)
        return -F.logsigmoid(0.1 * (chosen - rejected - 0.3))  # Rafailov et al. 2023, arXiv 2305.18290; 0.3: reference

    return on_a_head(loss)


@row("… other losses of its log-probabilities: focal, distillation, DPO, policy gradient, CTC", "yes")
def policy() -> Case:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        log_p = logits.log_softmax(-1)
        taken = log_p.gather(1, labels[:, None])[:, 0]
        advantage = torch.linspace(-1, 1, len(labels))
        entropy = -(log_p.exp() * log_p).sum(-1)
        return -(advantage * (taken - taken.detach()).exp() + 0.01 * entropy).mean()

    return on_a_head(loss)


@row("… other losses of its log-probabilities: focal, distillation, DPO, policy gradient, CTC", "yes")
def speech() -> Case:
    w, hidden, labels = matrix(), torch.randn(20, 2, WIDTH), torch.randint(1, ROWS, (2, 5))
    full = torch.full((2,), 20), torch.full((2,), 5)
    return Case([w], lambda: F.ctc_loss((hidden @ w.T).log_softmax(-1), labels, *full))


@row("… with a z-loss", "nearly")
def z_loss() -> Case:
    return on_a_head(
        lambda logits, labels: F.cross_entropy(logits, labels) + 1e-4 * logits.logsumexp(-1).square().mean()
    )


@row("… with soft-capped logits", "nearly")
def soft_capped() -> Case:
    return on_a_head(lambda logits, labels: F.cross_entropy(30 * (logits / 30).tanh(), labels))


@row("… tied to the input embedding", "no")
def tied() -> Case:
    return on_a_head(F.cross_entropy, tie_word_embeddings=True)


@row("decoder of a masked language model", "yes")
def masked() -> Case:
    options = {"vocab_size": ROWS, "tie_word_embeddings": False, **SIZES}
    model, text = transformer("BertForMaskedLM", "BertConfig", **options), tokens()
    hidden = torch.rand(text.shape) < 0.15
    labels = text.masked_fill(~hidden, -100)
    return Case(coupled(model), lambda: model(text.masked_fill(hidden, 3), labels=labels).loss)


@row("input embedding that is not tied", "no")
def input_embedding() -> Case:
    model, text = llama(), tokens()
    return Case([model.get_input_embeddings().weight], lambda: model(text, labels=text).loss, FLOAT32)


@row("input embedding that is not tied", "no")
def bags_of_features() -> Case:
    model = nn.Sequential(nn.EmbeddingBag(ROWS, WIDTH), nn.Linear(WIDTH, 1))
    clicked = torch.randint(2, (POSITIONS, 1)).double()
    bags = torch.randint(ROWS, (POSITIONS, 5))
    return Case([model[0].weight], lambda: F.binary_cross_entropy_with_logits(model(bags), clicked))


# -------------------------------------------------------------------------------------------------------- several heads


@row("the heads of MusicGen, one per codebook", "yes")
def musicgen() -> Case:
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": ROWS, "bos_token_id": None}
    config = transformers.MusicgenDecoderConfig(vocab_size=ROWS, initializer_factor=0.5, **special, **sizes)
    model = transformers.MusicgenForCausalLM(config).double().eval()
    codes = torch.randint(ROWS, (2, 6, config.num_codebooks))  # of two pieces of music
    heads = coupled(model)
    assert len(heads) == config.num_codebooks > 1
    ids = codes.transpose(1, 2).flatten(0, 1)
    return Case(heads, lambda: model(ids, labels=codes).loss)


class NextTokens(nn.Module):
    """Predicts the next token and the one after it: a Llama, and a block that also sees the next token.

    As in DeepSeek-V3 (arXiv 2412.19437, section 2.2), where both share input embedding and head.
    """

    def __init__(self) -> None:
        super().__init__()
        self.main, self.block = llama(), llama().model
        self.block.embed_tokens = None
        self.join = nn.Linear(2 * SIZES["hidden_size"], SIZES["hidden_size"], bias=False)

    def loss(self, text: Tensor, head: nn.Module) -> Tensor:
        hidden = self.main.model(text).last_hidden_state
        next_one = self.main.get_input_embeddings()(text[:, 1:])
        later = self.block(inputs_embeds=self.join(torch.cat([hidden[:, :-1], next_one], -1))).last_hidden_state
        first = F.cross_entropy(self.main.lm_head(hidden[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        return first + 0.3 * F.cross_entropy(head(later[:, :-1]).flatten(0, 1), text[:, 2:].flatten())


@row("multi-token prediction, all through one head", "yes")
def one_head_for_several_tokens() -> Case:
    model, text = NextTokens(), tokens()
    return Case(coupled(model, coupled=model.main.lm_head), lambda: model.loss(text, model.main.lm_head))


@row("multi-token prediction, a head each", "yes")
def a_head_for_each_token() -> Case:
    model, text = NextTokens(), tokens()
    model.second = nn.Linear(SIZES["hidden_size"], ROWS, bias=False)
    return Case(coupled(model, coupled=[model.main.lm_head, model.second]), lambda: model.loss(text, model.second))


@row("`nn.AdaptiveLogSoftmaxWithLoss`: its head, and the last layer of each cluster", "yes")
def clusters() -> Case:
    softmax = nn.AdaptiveLogSoftmaxWithLoss(WIDTH, ROWS, cutoffs=[8, 18], div_value=2.0)
    hidden, labels = torch.randn(POSITIONS, WIDTH), torch.randint(ROWS, (POSITIONS,))
    last = [softmax.head, *(cluster[1] for cluster in softmax.tail)]
    return Case(coupled(softmax, coupled=last), lambda: softmax(hidden, labels).loss)


@row("… the first layer of a cluster, which projects", "no")
def projections() -> Case:
    softmax = nn.AdaptiveLogSoftmaxWithLoss(WIDTH, ROWS, cutoffs=[8, 18], div_value=2.0)
    hidden, labels = torch.randn(POSITIONS, WIDTH), torch.randint(ROWS, (POSITIONS,))
    return Case([cluster[0].weight for cluster in softmax.tail], lambda: softmax(hidden, labels).loss)


# ---------------------------------------------------------------------------------------- classification, and retrieval


def on_a_matrix(loss_of: Callable[[Tensor, Tensor], Tensor], rows: int = ROWS) -> Case:
    """A loss of the scores (N, V) of all rows, and one label (N,) each."""
    w, hidden, labels = matrix(rows), torch.randn(POSITIONS, WIDTH), torch.randint(rows, (POSITIONS,))
    return Case([w], lambda: loss_of(hidden @ w.T, labels))


@row("classifier with many classes, softmax or multi-class hinge", "yes")
def classes() -> Case:
    return on_a_matrix(F.cross_entropy)


@row("classifier with many classes, softmax or multi-class hinge", "yes")
def hinge() -> Case:
    return on_a_matrix(F.multi_margin_loss)


@row("classifier with many labels, a sigmoid each (BCE)", "no")
def many_labels() -> Case:
    return on_a_matrix(
        lambda scores, labels: F.binary_cross_entropy_with_logits(scores, F.one_hot(labels, ROWS).double())
    )


@row("softmax over cosines (CosFace, ArcFace)", "no")
def cosines() -> Case:
    w, hidden, labels = matrix(), torch.randn(POSITIONS, WIDTH), torch.randint(ROWS, (POSITIONS,))
    hidden = F.normalize(hidden)
    return Case([w], lambda: F.cross_entropy(hidden @ F.normalize(w).T / 0.1, labels))


def on_a_table(loss_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Case:
    """A loss of users (N, H), as a tower makes them, of the items (N, H) they chose, and of others (M, H).

    The items are looked up in a table, whose gradients are sparse.
    """
    items, tower = (
        nn.Embedding(ROWS, WIDTH, sparse=True),
        nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, WIDTH)),
    )
    features, chosen, others = torch.randn(6, 5), torch.randperm(ROWS)[:6], torch.randint(ROWS, (7,))
    return Case([items.weight], lambda: loss_of(tower(features), items(chosen), items(others)))


def scores(users: Tensor, chosen: Tensor, others: Tensor) -> Tensor:
    """(N, 1 + M): of the item that was chosen, then of the others."""
    return torch.cat([(users * chosen).sum(1, keepdim=True), users @ others.T], 1)


@row("item table, sampled softmax, with or without logQ correction", "yes")
def sampled() -> Case:
    return on_a_table(lambda *given: -scores(*given).log_softmax(1)[:, 0].mean())


@row("item table, sampled softmax, with or without logQ correction", "yes")
def corrected() -> Case:
    log_q = torch.rand(1, 8).log()
    return on_a_table(lambda *given: -(scores(*given) - log_q).log_softmax(1)[:, 0].mean())


@row("item table, softmax over the items of the batch (InfoNCE)", "yes")
def in_batch() -> Case:
    return on_a_table(lambda users, chosen, _: F.cross_entropy(users @ chosen.T / 0.1, torch.arange(len(users))))


@row("… in both directions: also over the users of the batch", "no")
def both_directions() -> Case:
    def loss(users: Tensor, chosen: Tensor, _: Tensor) -> Tensor:
        logits, own = users @ chosen.T / 0.1, torch.arange(len(users))
        return F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)

    return on_a_table(loss)


@row("item table, pairs of items (BPR, hinge)", "yes")
def ranked() -> Case:
    def loss(users: Tensor, chosen: Tensor, others: Tensor) -> Tensor:
        return -F.logsigmoid((users * (chosen - others[: len(users)])).sum(1)).mean()

    return on_a_table(loss)


@row("item table, pairs of items (BPR, hinge)", "yes")
def with_a_margin() -> Case:
    def loss(users: Tensor, chosen: Tensor, others: Tensor) -> Tensor:
        return F.relu(1 - (users * (chosen - others[: len(users)])).sum(1)).mean()

    return on_a_table(loss)


@row("item table, negative sampling or NCE, a sigmoid each (word2vec)", "no")
def negative_sampling() -> Case:
    sign = torch.tensor([1.0] + 7 * [-1.0])
    return on_a_table(lambda *given: -F.logsigmoid(sign * scores(*given)).sum(1).mean())


@row("item table that also encodes the history (SASRec)", "no")
def history() -> Case:
    items, encoder = nn.Embedding(ROWS, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)
    seen = torch.randint(ROWS, (5, 9))

    def loss() -> Tensor:
        states, _ = encoder(items(seen[:, :-1]))
        return F.cross_entropy((states @ items.weight.T).flatten(0, 1), seen[:, 1:].flatten())

    return Case([items.weight], loss)


@row("last layer of an item tower", "no")
def tower() -> Case:
    last = nn.Linear(9, WIDTH)
    users, features = torch.randn(POSITIONS, WIDTH), torch.randn(POSITIONS, 9)
    return Case([last.weight], lambda: F.cross_entropy(users @ last(features).T, torch.arange(POSITIONS)))


# -------------------------------------------------------------------------------------------------------------- routers

MOE = {"vocab_size": ROWS, "num_key_value_heads": 2, "num_experts_per_tok": 2, **SIZES}
MOE |= {"experts_implementation": "eager"}  # the others multiply in float32 at most


def routers(name: str, config: str, gate: str, **options: object) -> Case:
    model, text = transformer(name, config, **MOE, **options), tokens()
    gates = [p for n, p in model.named_parameters() if n.endswith(gate)]
    assert gates and not {id(p) for p in gates} & {id(p) for p in coupled(model)}, "routers are not coupled unasked"
    return Case(gates, lambda: model(text, labels=text).loss, FLOAT32)


@row("router, softmax before or after the top k (Mixtral, Qwen-MoE, gpt-oss)", "yes")
def mixtral() -> Case:
    return routers("MixtralForCausalLM", "MixtralConfig", "gate.weight", num_local_experts=6)


@row("router, softmax before or after the top k (Mixtral, Qwen-MoE, gpt-oss)", "yes")
def qwen() -> Case:
    sizes = {"num_experts": 6, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    return routers("Qwen2MoeForCausalLM", "Qwen2MoeConfig", "mlp.gate.weight", norm_topk_prob=False, **sizes)


@row("router, softmax before or after the top k (Mixtral, Qwen-MoE, gpt-oss)", "yes")
def gpt_oss() -> Case:
    return routers("GptOssForCausalLM", "GptOssConfig", "router.weight", num_local_experts=6, head_dim=8)


@row("… with a load-balancing loss", "yes")
def balanced() -> Case:
    balance = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
    return routers("MixtralForCausalLM", "MixtralConfig", "gate.weight", num_local_experts=6, **balance)


@row("… with a router z-loss (Switch Transformers)", "no")
def switch() -> Case:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    experts = {"num_experts": 6, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    config = transformers.SwitchTransformersConfig(vocab_size=ROWS, dropout_rate=0.0, **sizes, **experts)
    model, text = transformers.SwitchTransformersForConditionalGeneration(config).double().eval(), tokens()
    gates = [p for n, p in model.named_parameters() if n.endswith("router.classifier.weight")]
    options = {"output_router_logits": True, "decoder_input_ids": text, "labels": text}
    return Case(gates, lambda: model(text, **options).loss, FLOAT32)


@row("router, a sigmoid each (DeepSeek-V3)", "no")
def deepseek() -> Case:
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": 6, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8}
    name, config = "DeepseekV3ForCausalLM", "DeepseekV3Config"
    return routers(name, config, "gate.weight", first_k_dense_replace=0, **heads, **experts)


# ------------------------------------------------------------------------------------------------------------ the tests

CASES = [pytest.param(zero_sum, case, id=case.__name__) for zero_sum, cases in TABLE.values() for case in cases]


def moved(matrices: Sequence[Tensor], loss: Loss, second_moment: str) -> float:
    """How far the means have moved in three steps, over the mean distance that rows have moved; the largest."""
    before = [m.detach().clone() for m in matrices]
    groups = [{"params": list(matrices), "second_moment": second_moment}]
    optimizer = CoupledAdam(groups, lr=0.01, eps=1e-30)
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        for m in matrices:
            m.grad = m.grad.to_dense()
        optimizer.step()
    ratios = [mean_shift_ratio(m.detach() - old) for m, old in zip(matrices, before, strict=True)]
    with torch.no_grad():
        for m, old in zip(matrices, before, strict=True):
            m.copy_(old)
    return max(ratios)


@pytest.mark.parametrize(("zero_sum", "case"), CASES)
def test_the_mean_stays_where_the_page_says_so(zero_sum: str, case: Callable[[], Case]) -> None:
    matrices, loss, rounding = case()
    loss().backward()
    sums = [mean_shift_ratio(m.grad.to_dense()) for m in matrices]
    by_coupled, by_adam = (moved(matrices, loss, kind) for kind in ("vocabulary", "elementwise"))
    changed = change_by_a_shift(matrices, loss)
    assert by_adam > 0.05, "without coupling, the mean moves"
    if zero_sum == "yes":
        assert max(*sums, by_coupled, changed) < rounding
    else:
        low, high = (1e-4, 0.02) if zero_sum == "nearly" else (0.02, 1.0)
        assert all(low < x < high for x in (*sums, by_coupled))
        assert changed > 1e-6


def change_by_a_shift(matrices: Sequence[Tensor], loss: Loss) -> float:
    """How much the loss changes when one vector is added to all rows of a matrix, relative to it."""
    before = loss().item()
    with torch.no_grad():
        for m in matrices:
            m.add_(torch.randn(m.shape[1]))
    return abs(loss().item() - before) / abs(before)


def test_two_rows_of_a_softmax_have_one_second_moment_anyway() -> None:
    """Their gradients differ in sign alone: coupling a classifier of two classes leaves AdamW's steps as they are."""
    (w,), loss, _ = on_a_matrix(F.cross_entropy, rows=2)
    other = nn.Parameter(w.detach().clone())
    coupled, adam = CoupledAdam([{"params": [w], "second_moment": "vocabulary"}]), AdamW([other], weight_decay=0.0)
    for _ in range(3):
        coupled.zero_grad()
        loss().backward()
        other.grad = w.grad.clone()
        coupled.step()
        adam.step()
    torch.testing.assert_close(w, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_rounding_leaves_no_more_than_the_page_says(dtype: torch.dtype, rounding: float, scale: float) -> None:
    """Also where all probabilities round alike, and all positions point the same way."""
    w, hidden = nn.Parameter(scale * torch.randn(2000, 64, dtype=dtype)), 1 + torch.randn(500, 64, dtype=dtype)
    F.cross_entropy(hidden @ w.T, torch.randint(2000, (500,))).backward()
    assert 0 < mean_shift_ratio(w.grad) < rounding


def test_the_page_has_every_row() -> None:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text("utf-8").splitlines()]
    rows = [row for row in cells if len(row) == 4 and row[1] in ("yes", "nearly", "no")]
    assert [row[:2] for row in rows] == [[matrix, zero_sum] for matrix, (zero_sum, _) in TABLE.items()]
