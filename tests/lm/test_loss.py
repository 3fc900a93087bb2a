"""The loss in chunks against torch's own of all positions at once, and what it allocates."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from coupled_adam.lm import loss as loss_module
from coupled_adam.lm.loss import CHUNK, STATISTICS, TiedGradient, head_logits, linear_cross_entropy, tied_embedding

VOCABULARY, WIDTH = 50, 6
POSITIONS = 2 * CHUNK + 3  # three chunks, the last of them small


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    seeded = torch.Generator().manual_seed(len(shape) + shape[0])
    return torch.randn(shape, dtype=torch.float64, generator=seeded).to(dtype)


def ids(seed: int, positions: int = POSITIONS) -> Tensor:
    return torch.randint(VOCABULARY, (positions,), generator=torch.Generator().manual_seed(seed))


def ours(weight: Tensor, inner: Tensor, seed: int = 1, positions: int = POSITIONS, **settings) -> Tensor:
    """The loss of the smallest language model: embedding, one matrix, tied head."""
    tied = TiedGradient()
    hidden = tied_embedding(ids(seed, positions), weight, tied) @ inner
    return linear_cross_entropy(hidden, weight, ids(seed + 1, positions), tied, **settings).total


def textbook(weight: Tensor, inner: Tensor, seed: int = 1, positions: int = POSITIONS) -> Tensor:
    hidden = F.embedding(ids(seed, positions), weight) @ inner
    return F.cross_entropy(F.linear(hidden, weight), ids(seed + 1, positions), reduction="sum")


def gradients(loss, dtype: torch.dtype = torch.float64, scale: float = 0.3) -> list[Tensor]:
    weight, inner = random(VOCABULARY, WIDTH, dtype=dtype), random(WIDTH, WIDTH, dtype=dtype)
    weight.requires_grad_()
    inner.requires_grad_()
    value = loss(weight, inner)
    (scale * value).backward()
    return [value.detach(), weight.grad, inner.grad]


def test_loss_and_gradients_of_a_tied_matrix_are_those_of_torch() -> None:
    torch.testing.assert_close(gradients(ours), gradients(textbook), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("positions", [1, CHUNK, POSITIONS])
def test_loss_and_gradients_of_an_untied_head_are_those_of_torch(positions: int) -> None:
    found, expected = [], []
    for results, loss in (
        (found, lambda h, w, y: linear_cross_entropy(h, w, y).total),
        (expected, lambda h, w, y: F.cross_entropy(F.linear(h, w), y, reduction="sum")),
    ):
        hidden, weight = random(positions, WIDTH).requires_grad_(), random(VOCABULARY, WIDTH).requires_grad_()
        value = loss(hidden, weight, ids(1, positions))
        value.backward()
        results += [value.detach(), hidden.grad, weight.grad]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_bias_is_added_to_the_logits_and_gets_its_gradient(frozen: bool, softcap: float | None) -> None:
    def peer(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        s = F.linear(h, w, b)
        return F.cross_entropy(s if softcap is None else softcap * torch.tanh(s / softcap), y, reduction="sum")

    def found(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, y, bias=b, softcap=softcap).total

    results = []
    for loss in (found, peer):
        h, w, b = random(POSITIONS, WIDTH), random(VOCABULARY, WIDTH), random(VOCABULARY)
        for x in (b,) if frozen else (h, w, b):
            x.requires_grad_()
        (0.3 * loss(h, w, b, ids(1))).backward()
        results.append([x.grad for x in (h, w, b)])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        assert torch.equal(head_logits(h, w, None, "float32", b), F.linear(h, w) + b)


def test_gradients_of_several_batches_add_up() -> None:
    def twice(loss):
        return lambda weight, inner: loss(weight, inner, 1) + loss(weight, inner, 7, 5)

    torch.testing.assert_close(gradients(twice(ours)), gradients(twice(textbook)), rtol=1e-11, atol=1e-11)


def test_autocast_rounds_products_and_not_the_gradient_of_the_matrix() -> None:
    exact = gradients(textbook)
    with autocast():
        found, peer = gradients(ours, torch.float32), gradients(textbook, torch.float32)

    def errors(some: list[Tensor]) -> list[float]:
        return [((x - y).norm() / y.norm()).item() for x, y in zip(some, exact, strict=True)]

    assert [x.dtype for x in found] == [torch.float32] * 3
    for ours_off, theirs_off in zip(errors(found), errors(peer), strict=True):
        assert ours_off <= 1.1 * theirs_off < 0.02


def test_a_frozen_matrix_gets_no_gradient_and_the_rest_does() -> None:
    weight, inner = random(VOCABULARY, WIDTH), random(WIDTH, WIDTH).requires_grad_()
    ours(weight, inner).backward()
    assert weight.grad is None
    torch.testing.assert_close(inner.grad, gradients(textbook, scale=1.0)[2], rtol=1e-11, atol=1e-11)


def test_a_second_backward_pass_is_refused() -> None:
    weight, inner = random(VOCABULARY, WIDTH).requires_grad_(), random(WIDTH, WIDTH).requires_grad_()
    loss = ours(weight, inner)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


def test_an_embedding_without_its_head_is_told_so() -> None:
    with pytest.raises(RuntimeError, match="no gradient came from the head"):
        tied_embedding(ids(1), random(VOCABULARY, WIDTH).requires_grad_(), TiedGradient()).sum().backward()


def test_a_head_above_a_detached_embedding_keeps_its_gradient() -> None:
    weight = random(VOCABULARY, WIDTH).requires_grad_()
    linear_cross_entropy(random(5, WIDTH), weight, ids(1, 5), TiedGradient()).total.backward()
    assert weight.grad is not None


#: Large enough for each term to weigh as much as the cross entropy.
TERMS = {
    "z-loss": {"z_loss": 0.3},
    "μ-loss": {"mu_loss": 20.0},
    "soft-cap": {"softcap": 2.0},
    "all": {"z_loss": 0.3, "mu_loss": 20.0, "softcap": 2.0},
}


def textbook_terms(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0, mu_loss: float = 0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The sum that is minimized, and the cross entropy in it."""
    logits = F.linear(hidden, weight)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    entropy = F.cross_entropy(logits, targets, reduction="sum")
    squares = logits.exp().sum(1).log().square().sum()
    return entropy + z_loss * squares + mu_loss * len(hidden) * weight.mean(0).norm() ** 2, entropy


@pytest.mark.parametrize("settings", TERMS.values(), ids=TERMS)
def test_penalties_and_soft_cap_are_their_equations(settings) -> None:
    found, expected = [], []
    for results, loss in ((found, linear_cross_entropy), (expected, textbook_terms)):
        hidden, weight = random(POSITIONS, WIDTH).requires_grad_(), random(VOCABULARY, WIDTH).requires_grad_()
        total, entropy = loss(hidden, weight, ids(1), **settings)[:2]
        (0.3 * total).backward()
        results += [total.detach(), entropy.detach(), hidden.grad, weight.grad]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert (found[0] > 1.1 * found[1]) == ("softcap" not in settings or len(settings) > 1), "the penalties count"


@pytest.mark.parametrize("settings", TERMS.values(), ids=TERMS)
def test_their_gradients_reach_a_tied_matrix(settings) -> None:
    def expected(weight: Tensor, inner: Tensor) -> Tensor:
        return textbook_terms(F.embedding(ids(1), weight) @ inner, weight, ids(2), **settings)[0]

    found = gradients(lambda weight, inner: ours(weight, inner, **settings))
    torch.testing.assert_close(found, gradients(expected), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("settings", TERMS.values(), ids=TERMS)
def test_the_gradients_are_those_of_finite_differences(settings) -> None:
    weight, inner, step = random(VOCABULARY, WIDTH), random(WIDTH, WIDTH), 1e-5
    _, *grads = gradients(lambda weight, inner: ours(weight, inner, **settings), scale=1.0)
    for seed in range(3):
        towards = [random(seed + 3, *x.shape)[0] for x in (weight, inner)]
        ahead, behind = (
            ours(weight + sign * step * towards[0], inner + sign * step * towards[1], **settings) for sign in (1, -1)
        )
        slope = sum((grad * x).sum() for grad, x in zip(grads, towards, strict=True))
        assert ((ahead - behind) / (2 * step)).item() == pytest.approx(slope.item(), rel=1e-6)


def test_the_penalties_of_parts_of_a_batch_add_up_to_those_of_the_batch() -> None:
    hidden, weight, targets = random(60, WIDTH), random(VOCABULARY, WIDTH), ids(1, 60)
    whole = linear_cross_entropy(hidden, weight, targets, **TERMS["all"])
    parts = [linear_cross_entropy(hidden[a:b], weight, targets[a:b], **TERMS["all"]) for a, b in ((0, 20), (20, 60))]
    torch.testing.assert_close(sum(part.total for part in parts), whole.total)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def rounded_losses(hidden: Tensor, weight: Tensor, **settings) -> list[Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    losses = linear_cross_entropy(hidden, weight, ids(1, len(hidden)), **settings)
    losses.total.backward()
    return [losses.total.detach(), losses.cross_entropy, hidden.grad, weight.grad]


def test_a_head_in_bfloat16_is_that_of_autocast_wherever_it_stands() -> None:
    hidden, weight = random(POSITIONS, WIDTH, dtype=torch.float32), random(VOCABULARY, WIDTH, dtype=torch.float32)
    plain = F.linear(hidden, weight)
    with autocast():
        logits, found = F.linear(hidden, weight), rounded_losses(hidden, weight)
    assert logits.dtype == torch.bfloat16
    # A CPU without such instructions adds in another order.
    assert (head_logits(hidden, weight, None, "bfloat16") != logits.float()).float().mean() < 1e-3
    assert all(map(torch.equal, rounded_losses(hidden, weight, logits="bfloat16"), found))
    exact = rounded_losses(hidden, weight)
    assert found[1] != exact[1], "rounding shows"
    with autocast():
        assert all(map(torch.equal, rounded_losses(hidden, weight, logits="float32"), exact))
        assert torch.equal(head_logits(hidden, weight, None, "float32"), plain)


@pytest.mark.parametrize("cpu_multiplies_bfloat16", [True, False])
def test_logits_in_bfloat16_are_products_of_rounded_numbers_rounded(
    cpu_multiplies_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_cpu_multiplies_bfloat16", lambda: cpu_multiplies_bfloat16)
    hidden, weight = random(200, 64, dtype=torch.float32), random(VOCABULARY, 64, dtype=torch.float32)
    exact = F.linear(hidden.bfloat16().double(), weight.bfloat16().double())
    found = head_logits(hidden, weight, None, "bfloat16")
    assert torch.equal(found, found.bfloat16().float())
    # But for sums that lie, to float32 rounding, between two numbers of bfloat16.
    assert (found != exact.bfloat16().float()).float().mean() < 1e-3
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)
    total, entropy, dh, dw = rounded_losses(hidden, weight, logits="bfloat16")
    logits = found.double().requires_grad_()
    expected = F.cross_entropy(logits, ids(1, 200), reduction="sum")
    expected.backward()
    assert total.item() == entropy.item() == pytest.approx(expected.item(), rel=1e-6)
    ds = logits.grad.bfloat16().double()
    torch.testing.assert_close(dh.double(), ds @ weight.bfloat16().double(), rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(dw.double(), ds.T @ hidden.bfloat16().double(), rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("settings", [{}, {"softcap": 2.0}, {"softcap": 2.0, "logits": "bfloat16", "z_loss": 1.0}])
def test_statistics_are_those_of_the_logits_as_the_model_makes_them(settings) -> None:
    hidden, weight = random(POSITIONS, WIDTH, dtype=torch.float32), random(VOCABULARY, WIDTH, dtype=torch.float32) + 0.3
    with torch.no_grad():
        found = linear_cross_entropy(hidden, weight, ids(1), **settings)
    logits = head_logits(hidden, weight, settings.get("softcap"), settings.get("logits")).double()
    expected = [
        logits.mean(1),
        logits.std(1, correction=0),
        logits.abs().amax(1),
        logits.logsumexp(1).square(),
    ]
    assert found.statistics.dtype == torch.float32 and len(found.statistics) == len(STATISTICS)
    torch.testing.assert_close(found.statistics.double(), torch.stack(expected).sum(1), rtol=1e-5, atol=1e-2)
    entropy = F.cross_entropy(logits, ids(1), reduction="sum").item()
    assert found.cross_entropy.item() == pytest.approx(entropy, rel=1e-6)
    assert linear_cross_entropy(hidden, weight, ids(1), **settings).statistics is None, "they cost two passes"


def allocations(loss, vocabulary: int, positions: int, differentiate: bool = True) -> list[int]:
    """Bytes of each large block that the loss and its backward pass take, in their order."""
    weight, inner = random(vocabulary, 256, dtype=torch.float32), torch.eye(256)
    if differentiate:
        weight.requires_grad_()
        inner.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        value = loss(weight, inner, 1, positions)
        if differentiate:
            value.backward()
    return [e.self_cpu_memory_usage for e in profiled.events() if e.self_cpu_memory_usage >= 4 * vocabulary * 256]


def test_a_tied_matrix_has_one_gradient_and_the_logits_of_a_chunk_are_all_there_are() -> None:
    vocabulary, positions = 20_000, 8  # the logits are small beside the matrix
    assert len(allocations(ours, vocabulary, positions)) == 1
    assert len(allocations(partial(ours, **TERMS["all"]), vocabulary, positions)) == 1
    assert len(allocations(textbook, vocabulary, positions)) > 1
    assert allocations(ours, vocabulary, positions, differentiate=False) == []
    logits = 4 * 3_000 * CHUNK
    assert max(allocations(ours, 3_000, 4 * CHUNK)) == logits
    assert max(allocations(textbook, 3_000, 4 * CHUNK)) == 4 * logits
