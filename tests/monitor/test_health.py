"""Health of an embedding where it lies: the figures of the metrics, whatever holds the matrix."""

import importlib
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import LlamaConfig, LlamaForCausalLM

from coupled_adam import geometry, monitor
from coupled_adam.monitor import shards

HEALTH = importlib.import_module("coupled_adam.monitor.health")  # the package has a function of that name


def made_up(rows: int = 700, width: int = 24) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, width)) * np.geomspace(1, 0.01, width) + 0.3


@pytest.mark.parametrize("rows", [700, 9])
def test_the_figures_are_those_of_the_metrics(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ELEMENTS_ON_CPU", 1000)  # several blocks, the last one shorter
    e = made_up(rows)
    found = monitor.health(e, isotropy=True)
    assert list(found) == ["mean_shift_ratio", "norm_of_mean", "principal_share", "inverse_condition", "isotropy"]
    assert found == pytest.approx({name: getattr(geometry, name)(e) for name in found}, rel=1e-9)
    assert monitor.health(torch.tensor(e, dtype=torch.bfloat16)) == pytest.approx(
        {k: v for k, v in found.items() if k != "isotropy"}, rel=0.05
    )


def test_the_share_of_the_principal_direction_by_hand() -> None:
    # Around their mean, (2, 0), the rows are at ±2 along the first axis and at ±1 along the second.
    cross = [[4.0, 0.0], [0.0, 0.0], [2.0, 1.0], [2.0, -1.0]]
    assert geometry.principal_share(cross) == monitor.health(torch.tensor(cross))["principal_share"] == 0.8
    line = np.outer(np.arange(5.0), [1.0, 2.0]) + 7
    assert geometry.principal_share(line) == pytest.approx(1)
    assert np.isnan(geometry.principal_share(np.full((3, 2), 0.1))), "there is no direction"


def model(tied: bool) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=120, tie_word_embeddings=tied, **sizes))


def test_a_model_says_what_its_embeddings_are() -> None:
    untied = model(tied=False)
    found = monitor.health(untied)
    output, entry = (monitor.health(e.weight) for e in (untied.lm_head, untied.model.embed_tokens))
    assert found == output | {f"input_{name}": figure for name, figure in entry.items()}
    untied.get_output_embeddings = lambda: [untied.lm_head.weight]
    assert monitor.health(untied) == found, "as a parameter, in a list"
    untied.get_output_embeddings = lambda: nn.ModuleList([untied.lm_head, untied.lm_head])
    untied.get_input_embeddings = lambda: None
    with pytest.raises(ValueError, match=r"returns None or several\); pass the matrix itself"):
        monitor.health(untied)
    tied = model(tied=True)
    assert monitor.health(nn.Sequential(tied)) == monitor.health(tied.lm_head.weight), "one matrix, once"


def test_what_is_no_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match="does not say what its embeddings are"):
        monitor.health(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"two rows or more, not of shape \(12,\)\. FSDP1"):
        monitor.health(torch.zeros(12))


CUTS = {"rows": [Shard(0)], "columns": [Shard(1)], "whole": [Replicate()]}


def sharded(layout: str, rows: int) -> tuple[dict[str, float], int]:
    """What a process finds of a matrix spread over all of them, and in how many numbers others' parts came."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    matrix = distribute_tensor(torch.tensor(made_up(rows)), mesh, CUTS[layout], src_data_rank=None)
    assert isinstance(matrix, DTensor)
    with CommDebugMode() as sent:
        found = monitor.health(matrix, isotropy=True)
    gathers = sum(count for name, count in sent.get_comm_counts().items() if "gather" in str(name))
    return found, gathers


@pytest.mark.long
@pytest.mark.parametrize("layout", CUTS)
@pytest.mark.parametrize("rows", [700, 2])
def test_three_processes_find_what_one_does(layout: str, rows: int, processes: Any) -> None:
    alone = monitor.health(made_up(rows), isotropy=True)
    found = processes(3).run(sharded, layout, rows)
    for figures, gathers in found:
        assert figures == pytest.approx(alone, rel=1e-9)
        # The matrix stays where it is; one cut by columns is sent once, for which gloo has nothing but a gather.
        assert gathers == (layout == "columns")


def vocabulary_shards(rows: list[int]) -> tuple[dict[str, float], dict[str, float]]:
    """What a process finds of a tied model and of its matrix, of which each process holds so many rows."""
    first = sum(rows[: dist.get_rank()])
    tied = model(tied=True)
    shard = nn.Parameter(torch.tensor(made_up(sum(rows))[first : first + rows[dist.get_rank()]]))
    shard.vocabulary_group = dist.group.WORLD
    tied.lm_head.weight = tied.model.embed_tokens.weight = shard
    with CommDebugMode() as sent:
        found = monitor.health(shard, isotropy=True)
    assert not any("gather" in str(name) for name in sent.get_comm_counts()), "the matrix stays where it is"
    return found, monitor.health(nn.Sequential(tied), isotropy=True)


@pytest.mark.long
@pytest.mark.parametrize("rows", [[300, 1, 399], [2, 0, 0], [1, 0, 1]], ids=str)
def test_three_processes_find_of_vocabulary_shards_what_one_does_of_the_matrix(rows: list[int], processes: Any) -> None:
    alone = monitor.health(made_up(sum(rows)), isotropy=True)
    for found in processes(3).run(vocabulary_shards, rows):
        assert found == (pytest.approx(alone, rel=1e-9), pytest.approx(alone, rel=1e-9))


def odd_shards() -> list[str]:
    """What a process is told of vocabulary shards that cannot be measured."""
    untied = model(tied=False)
    untied.lm_head.weight.vocabulary_group = dist.group.WORLD
    one_row = nn.Parameter(torch.zeros(int(dist.get_rank() == 1), 16))
    one_row.vocabulary_group = dist.group.WORLD
    flat = nn.Parameter(torch.zeros(16))
    flat.vocabulary_group = dist.group.WORLD
    errors = []
    for odd in (untied, one_row, flat):
        with pytest.raises(ValueError) as error:
            monitor.health(odd)
        errors.append(str(error.value))
    untied.model.embed_tokens.weight.vocabulary_group = dist.group.WORLD
    assert len(monitor.health(untied)) == 8
    return errors


@pytest.mark.long
def test_vocabulary_shards_that_cannot_be_measured_are_refused_in_every_process(processes: Any) -> None:
    for half_marked, one_row, flat in processes(3).run(odd_shards):
        assert "two embeddings of shape (120, 16), only one is marked" in half_marked
        assert "weight.vocabulary_group" in half_marked
        assert "two rows or more, not of shape (1, 16)" in one_row
        assert "two rows or more, not of shape (16,)" in flat


def spread(ratio: float, rows: int = 900, width: int = 40) -> torch.Tensor:
    """Rows whose spread falls to this share from the first to the last direction, which are no axes."""
    g = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64))[0]
    scales = torch.logspace(0, np.log10(ratio), width, dtype=torch.float64)
    return torch.randn(rows, width, generator=g, dtype=torch.float64) * scales @ directions


def by_svd(e: torch.Tensor) -> dict[str, float]:
    x = e.double().numpy()
    mean = x.mean(0)
    around, whole = (np.linalg.svd(m, compute_uv=False) for m in (x - mean, x))
    return {
        "mean_shift_ratio": np.linalg.norm(mean) / np.linalg.norm(x, axis=1).mean(),
        "norm_of_mean": np.linalg.norm(mean),
        "principal_share": around[0] ** 2 / (around**2).sum(),
        "inverse_condition": 100 * whole[-1] / whole[0],
    }


@pytest.fixture
def precisions(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Have small matrices treated as large ones; holds in which precision products were computed, one by one."""
    used: list[torch.dtype] = []
    products = HEALTH._spectra

    def recorded(e: torch.Tensor, height: int, mean: torch.Tensor, dtype: torch.dtype) -> Any:
        used.append(dtype)
        return products(e, height, mean, dtype)

    monkeypatch.setattr(HEALTH, "LARGE", 0)
    monkeypatch.setattr(HEALTH, "_spectra", recorded)
    return used


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shift", [0, 1, 100, 1e4])
@pytest.mark.parametrize("ratio", [1, 0.1, 1e-2, 1e-3])
def test_figures_from_products_in_float32_are_those_of_float64(
    dtype: torch.dtype, shift: float, ratio: float, precisions: list[torch.dtype]
) -> None:
    e = (spread(ratio) + shift * torch.linspace(-1, 1, 40, dtype=torch.float64)).to(dtype)
    found, wanted = monitor.health(e), by_svd(e)
    assert precisions[0] == (torch.float64 if dtype == torch.float64 else torch.float32)
    # What a shift leaves of the smallest singular value in EᵀE is what float64 resolves beside the largest.
    tolerance = 1e-4 if wanted["inverse_condition"] > 0.003 else 0.05
    assert found.pop("inverse_condition") == pytest.approx(wanted.pop("inverse_condition"), rel=tolerance)
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-3, 1e3, 1e12, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_and_huge_values(scale: float, dtype: torch.dtype, precisions: list[torch.dtype]) -> None:
    e = ((spread(0.1) + 0.2) * scale).to(dtype)
    found, wanted = monitor.health(e, isotropy=True), by_svd(e)
    assert 0 <= found.pop("isotropy") <= 1
    assert found == pytest.approx(wanted, rel=1e-6)
    assert monitor.health(e) == pytest.approx(wanted, rel=1e-4)


def test_an_ill_conditioned_matrix_is_measured_again_in_float64(precisions: list[torch.dtype]) -> None:
    monitor.health(spread(0.1).float())
    assert precisions == [torch.float32]
    for e in (spread(1e-3), spread(0.1) * (torch.arange(40) < 39), spread(1, rows=30)):
        precisions.clear()
        e = e.float()
        found, wanted = monitor.health(e), by_svd(e)
        assert precisions == ([torch.float32] if len(e) == 30 else [torch.float32, torch.float64])
        wanted = {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in wanted.items()}
        assert found == wanted
    precisions.clear()
    monitor.health(spread(0.1).float(), isotropy=True)  # whose directions need more digits than the other figures
    assert precisions == [torch.float64]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_that_is_not_finite_has_no_figures(value: float, dtype: torch.dtype) -> None:
    e = spread(1).to(dtype)
    e[7, 3] = value
    for isotropy in (False, True):
        found = monitor.health(e, isotropy=isotropy)
        assert list(found) == list(monitor.health(spread(1), isotropy=isotropy))
        assert all(np.isnan(figure) for figure in found.values())
