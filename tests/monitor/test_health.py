"""Health of an embedding where it lies: the figures of the metrics, whatever holds the matrix."""

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
