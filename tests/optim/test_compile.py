"""torch.compile takes the whole step, once."""

import pytest
import torch
from old_torch import compiles_clipped_steps
from torch import nn
from torch.nn import functional as F

from coupled_adam import Adams, CoupledAdam, param_groups

KINDS = {
    "coupled": lambda groups, lr: CoupledAdam(groups, lr=lr),
    "clipped": lambda groups, lr: CoupledAdam(groups, lr=lr, max_grad_norm=0.5),
    "factor": lambda groups, lr: CoupledAdam(groups, lr=lr, coupling_factor=0.1),
    "tempered": lambda groups, lr: CoupledAdam(groups, lr=lr, row_exponent=0.5),
    "narrow": lambda groups, lr: CoupledAdam(groups, lr=lr, exp_avg_dtype=torch.bfloat16),
    "adams": lambda groups, lr: Adams(groups, lr=lr),
}


def model_and_optimizer(kind: str, lr: float | torch.Tensor) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 50, bias=False))
    return model, KINDS[kind](param_groups(model, coupled=[model[3]]), lr)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    tokens = torch.randint(50, (32,), generator=torch.Generator().manual_seed(step))
    return F.cross_entropy(model(tokens), tokens.roll(1))


@pytest.mark.long
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=compiles_clipped_steps) if kind == "clipped" else kind for kind in KINDS]
)
def test_the_step_compiles_as_one_graph_and_not_again_when_the_learning_rate_changes(kind: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = (model_and_optimizer(kind, torch.tensor(1e-2)) for _ in range(2))

    # All of the compiler but its slow last stage, which the whole training step below goes through.
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled_step() -> None:
        compiled[1].step()

    graphs = []
    for i in range(6):
        for (model, optimizer), step in ((eager, eager[1].step), (compiled, compiled_step)):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            for group in optimizer.param_groups:
                group["lr"].fill_(1e-2 / (i + 1))
            step()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1:] == [2] * 5, "the first step also makes the state; after it there is one graph"
    for a, b in zip(eager[0].parameters(), compiled[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@compiles_clipped_steps
def test_a_whole_training_step_compiles() -> None:
    torch._dynamo.reset()
    (expected, eager), (found, optimizer) = (model_and_optimizer("clipped", torch.tensor(1e-2)) for _ in range(2))

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
        loss_of(model, i).backward()
        optimizer.step()
        optimizer.zero_grad()

    compiled = torch.compile(train)
    for i in range(4):
        train(expected, eager, i)
        compiled(found, optimizer, i)
    for a, b in zip(expected.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
