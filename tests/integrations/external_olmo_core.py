"""With OLMo-core itself: its model, configuration, checkpoints, FSDP2. Run by tools/check_integrations."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from external_loop import ROWS, STEPS, assert_close, train, whole
from olmo_core.distributed.checkpoint import load_model_and_optim_state, save_model_and_optim_state
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import CosWithWarmup, OptimConfig
from patched import output_of, patched
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from coupled_adam import CoupledAdam
from coupled_adam.integrations.olmo_core import CoupledAdamConfig, coupled_head

EPS = 1e-5  # above the rounding of gradients that are zero but for it, which Adam would blow up to a step


def olmo() -> Any:
    torch.manual_seed(0)
    config = TransformerConfig.llama_like(d_model=32, vocab_size=ROWS, n_layers=1, n_heads=2)
    model = config.build(init_device="cpu")
    model.init_weights(device=torch.device("cpu"))
    return model


def test_its_registered_configuration_trains_as_written_out() -> None:
    config = OptimConfig.from_dict(CoupledAdamConfig(lr=1e-2, betas=(0.9, 0.95)).as_config_dict())
    assert isinstance(config, CoupledAdamConfig)
    ours, reference = olmo(), olmo()
    head = reference.lm_head.w_out.weight
    rest = [p for p in reference.parameters() if p is not head]
    optimizer = CoupledAdam(
        [{"params": [head], "second_moment": "vocabulary", "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.1}],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    built = config.build(ours)
    assert built.param_groups[0]["initial_lr"] == 1e-2
    assert_close(whole(train(ours, built, range(STEPS))), whole(train(reference, optimizer, range(STEPS))))


def test_the_embedding_has_a_multiple_of_the_learning_rate_throughout_the_schedule() -> None:
    config = CoupledAdamConfig(lr=1e-2, group_overrides=coupled_head(embedding_lr_factor=10.0))
    config = OptimConfig.from_dict(config.as_config_dict())
    built = config.build(olmo())
    assert [group["initial_lr"] for group in built.param_groups] == pytest.approx([0.1, 0.01])
    scheduler, seen = CosWithWarmup(warmup=3), []
    for step in range(1, 10):
        rates = [float(scheduler.get_lr(group["initial_lr"], step, 10)) for group in built.param_groups]
        seen.append(rates)
    assert seen == [pytest.approx([10 * lr, lr]) for _, lr in seen]
    assert len({lr for lr, _ in seen}) > 5
    with pytest.raises(ValueError, match="Invalid embedding_lr_factor: 0"):
        coupled_head(embedding_lr_factor=0)


def half_way(folder: str, wrap: Any, rank: int = 0, ranks: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of an uninterrupted run, and of one that its checkpoint of the middle resumes."""
    model = wrap(olmo())
    optimizer = CoupledAdamConfig(lr=1e-2, eps=EPS).build(model)
    train(model, optimizer, range(2), rank, ranks)
    save_model_and_optim_state(folder, model, optimizer)
    expected = whole(train(model, optimizer, range(2, STEPS), rank, ranks))
    resumed = wrap(olmo())
    optimizer = CoupledAdamConfig(lr=1e-2, eps=EPS).build(resumed)
    load_model_and_optim_state(folder, resumed, optimizer)
    assert optimizer.state[resumed.lm_head.w_out.weight]["exp_avg_sq"].shape == (1, 32)
    return expected, whole(train(resumed, optimizer, range(2, STEPS), rank, ranks))


def test_it_resumes(tmp_path: Path) -> None:
    expected, resumed = half_way(str(tmp_path), lambda model: model)
    assert_close(resumed, expected, 0)


def test_bfloat16_weights_keep_float32_moments() -> None:
    model = olmo().to(torch.bfloat16)
    optimizer = CoupledAdamConfig(lr=1e-2, eps=EPS).build(model)
    train(model, optimizer, range(2))
    assert {x.dtype for state in optimizer.state.values() for x in state.values()} == {torch.float32}


def sharded(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def wrap(model: Any) -> Any:
        model.apply_fsdp(dp_mesh=mesh)
        assert isinstance(model.lm_head.w_out.weight, DTensor)
        return model

    expected, resumed = half_way(f"{folder}/checkpoint", wrap, rank, 2)
    assert_close(resumed, expected, 0)
    if rank == 0:
        torch.save(expected, f"{folder}/weights.pt")
    dist.destroy_process_group()


def test_fsdp2_on_two_processes_is_one_process_and_resumes() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(sharded, (folder,), nprocs=2)
        found = torch.load(f"{folder}/weights.pt")
    model = olmo()
    expected = whole(train(model, CoupledAdamConfig(lr=1e-2, eps=EPS).build(model), range(STEPS)))
    assert_close(found, expected, 1e-5)


PATCHED = """
import olmo_core, torch
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import CoupledAdamConfig, OptimConfig
config = TransformerConfig.llama_like(d_model=32, vocab_size=50, n_layers=1, n_heads=2)
model = config.build(init_device="cpu")
model.init_weights(device=torch.device("cpu"))
config = OptimConfig.from_dict(CoupledAdamConfig(lr=1e-2).as_config_dict())
optimizer = config.build(model)
model(torch.arange(8)[None]).logsumexp(-1).sum().backward()
optimizer.step()
print(olmo_core.__file__, tuple(optimizer.state[model.lm_head.w_out.weight]["exp_avg_sq"].shape))
"""


def test_the_patch_for_olmo_core_has_the_configuration(tmp_path: Path) -> None:
    found = output_of(PATCHED, patched("olmo_core", tmp_path)).strip()
    assert found == f"{tmp_path / 'olmo_core' / '__init__.py'} (1, 32)"
