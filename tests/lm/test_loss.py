"""The loss in chunks against torch's own of all positions at once, and what it allocates."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from coupled_adam.lm.loss import CHUNK, TiedGradient, linear_cross_entropy, tied_embedding

VOCABULARY, WIDTH = 50, 6
POSITIONS = 2 * CHUNK + 3  # three chunks, the last of them small


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    seeded = torch.Generator().manual_seed(len(shape) + shape[0])
    return torch.randn(shape, dtype=torch.float64, generator=seeded).to(dtype)


def ids(seed: int, positions: int = POSITIONS) -> Tensor:
    return torch.randint(VOCABULARY, (positions,), generator=torch.Generator().manual_seed(seed))


def ours(weight: Tensor, inner: Tensor, seed: int = 1, positions: int = POSITIONS) -> Tensor:
    """The loss of the smallest language model: embedding, one matrix, tied head."""
    tied = TiedGradient()
    hidden = tied_embedding(ids(seed, positions), weight, tied) @ inner
    return linear_cross_entropy(hidden, weight, ids(seed + 1, positions), tied).total


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


def test_gradients_of_several_batches_add_up() -> None:
    def twice(loss):
        return lambda weight, inner: loss(weight, inner, 1) + loss(weight, inner, 7, 5)

    torch.testing.assert_close(gradients(twice(ours)), gradients(twice(textbook)), rtol=1e-11, atol=1e-11)


def test_autocast_rounds_products_and_not_the_gradient_of_the_matrix() -> None:
    exact = gradients(textbook)
    with torch.autocast("cpu", torch.bfloat16):
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
    assert len(allocations(textbook, vocabulary, positions)) > 1
    assert allocations(ours, vocabulary, positions, differentiate=False) == []
    logits = 4 * 3_000 * CHUNK
    assert max(allocations(ours, 3_000, 4 * CHUNK)) == logits
    assert max(allocations(textbook, 3_000, 4 * CHUNK)) == 4 * logits
