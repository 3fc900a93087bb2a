"""With torchtitan itself: its llama3, its containers, its checkpoints, FSDP2. Run by tools/check_integrations."""

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from external_loop import STEPS, assert_close, train, whole
from patched import output_of, patched
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torchtitan.components.optimizer.lr_scheduler import LRSchedulersContainer
from torchtitan.models.llama3 import model_registry

from coupled_adam import CoupledAdam
from coupled_adam.integrations.torchtitan import CoupledOptimizers, coupled_adamw


class Attention(nn.Module):
    """Causal attention in place of torchtitan's kernel, which needs a GPU or a compiler."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool, scale: float | None, **_: Any) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        attend = nn.functional.scaled_dot_product_attention
        return attend(*heads_first, is_causal=True, scale=scale, enable_gqa=enable_gqa).transpose(1, 2)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(model_registry("debugmodel").model)
    config.layers = config.layers[:1]
    model = config.build()
    model.init_states()
    for name, _ in [*model.named_modules()]:
        if name.endswith("inner_attention"):
            model.set_submodule(name, Attention())
    return model


def test_it_trains_as_written_out() -> None:
    ours, reference = llama(), llama()
    container = coupled_adamw(lr=1e-3).build(model_parts=[ours])
    assert isinstance(container, CoupledOptimizers)
    head = reference.lm_head.weight
    rest = [p for p in reference.parameters() if p is not head]
    optimizer = CoupledAdam(
        [{"params": [head], "second_moment": "vocabulary", "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.1}],
        lr=1e-3,
        betas=(0.9, 0.95),
    )
    assert_close(whole(train(ours, container, range(STEPS))), whole(train(reference, optimizer, range(STEPS))))


def test_it_resumes_from_a_distributed_checkpoint(tmp_path: Path) -> None:
    model = llama()
    container = coupled_adamw(lr=1e-3).build(model_parts=[model])
    train(model, container, range(2))
    checkpoint.save({"model": model.state_dict(), "optimizer": container}, checkpoint_id=tmp_path)
    expected = whole(train(model, container, range(2, STEPS)))
    resumed = llama()
    container = coupled_adamw(lr=1e-3).build(model_parts=[resumed])
    content = {"model": resumed.state_dict(), "optimizer": container}
    checkpoint.load(content, checkpoint_id=tmp_path)
    resumed.load_state_dict(content["model"])
    assert container.optimizers[0].state[resumed.lm_head.weight]["exp_avg_sq"].shape == (1, 256)
    assert_close(whole(train(resumed, container, range(2, STEPS))), expected, 0)


def test_the_embedding_has_a_multiple_of_the_learning_rate_throughout_the_schedule(tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, CoupledOptimizers, LRSchedulersContainer]:
        model = llama()
        container = coupled_adamw(lr=1e-3, embedding_lr_factor=10.0).build(model_parts=[model])
        config = LRSchedulersContainer.Config(total_steps=8, warmup_steps=2)
        return model, container, config.build(optimizers=container, training_steps=8)

    def stepped(parts: tuple[Any, ...], steps: range) -> list[list[float]]:
        model, container, schedule = parts
        seen = []
        for step in steps:
            train(model, container, range(step, step + 1))
            seen.append([group["lr"] for group in container.optimizers[0].param_groups])
            schedule.step()
        return seen

    parts = made()
    first = stepped(parts, range(4))
    content = {"optimizer": parts[1], "lr_scheduler": parts[2]}
    checkpoint.save(content, checkpoint_id=tmp_path)
    second = stepped(parts, range(4, 7))
    assert first + second == [pytest.approx([10 * lr, lr]) for _, lr in first + second]
    assert len({lr for lr, _ in first + second}) > 4, "warm-up and decay"
    resumed = made()
    checkpoint.load({"optimizer": resumed[1], "lr_scheduler": resumed[2]}, checkpoint_id=tmp_path)
    assert stepped(resumed, range(4, 7)) == [pytest.approx(rates) for rates in second]
    with pytest.raises(ValueError, match="Invalid embedding_lr_factor: 0"):
        coupled_adamw(embedding_lr_factor=0)


def sharded(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, policy in (("float32", MixedPrecisionPolicy()), ("bf16", MixedPrecisionPolicy(torch.bfloat16))):
        model, mesh = llama(), init_device_mesh("cpu", (2,))
        for layer in model.layers.values() if isinstance(model.layers, nn.ModuleDict) else model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        container = coupled_adamw(lr=1e-3).build(model_parts=[model])
        train(model, container, range(2), rank, 2)
        checkpoint.save({"optimizer": container}, checkpoint_id=f"{folder}/{name}")
        train(model, container, range(2, STEPS), rank, 2)
        state = container.optimizers[0].state[model.lm_head.weight]
        assert state["exp_avg_sq"].shape == (1, 256) and state["exp_avg_sq"].dtype == torch.float32
        tensors = whole(model)
        if rank == 0:
            torch.save(tensors, f"{folder}/{name}.pt")
    dist.destroy_process_group()


def test_fsdp2_on_two_processes_is_one_process() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(sharded, (folder,), nprocs=2)
        found = {name: torch.load(f"{folder}/{name}.pt") for name in ("float32", "bf16")}
    model = llama()
    start = whole(model)
    expected = whole(train(model, coupled_adamw(lr=1e-3).build(model_parts=[model]), range(STEPS)))
    assert_close(found["float32"], expected, 1e-5)
    moved, wanted = (x["lm_head.weight"] - start["lm_head.weight"] for x in (found["bf16"], expected))
    assert nn.functional.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0) > 0.95


def test_what_would_go_wrong_is_told() -> None:
    with pytest.raises(ValueError, match="matched no parameters"):
        coupled_adamw(head="output").build(model_parts=[llama()])
    config = coupled_adamw()
    config.implementation = "fused_opt_states_bf16"
    with pytest.raises(ValueError, match="exp_avg_dtype"):
        config.build(model_parts=[llama()])
    config = coupled_adamw()
    config.param_groups[1].optimizer_name = "Adan"
    with pytest.raises(NotImplementedError, match="Adan"):
        config.build(model_parts=[llama()])


def test_its_default_implementation_is_no_demand() -> None:
    def fused(**kwargs: Any) -> list[bool | None]:
        config = coupled_adamw()
        config.param_groups[1].optimizer_kwargs |= kwargs
        return [group["fused"] for group in config.build(model_parts=[llama()]).optimizers[0].param_groups]

    assert fused() == [None, None]
    assert fused(fused=True) == [None, True], "but what a group says counts"
    config = coupled_adamw()
    config.implementation = "for-loop"
    (optimizer,) = config.build(model_parts=[llama()]).optimizers
    assert [group["fused"] for group in optimizer.param_groups] == [False, False]


def test_clipping_is_left_to_torchtitan() -> None:
    with pytest.raises(ValueError, match=r"set training\.max_norm, and leave max_grad_norm out"):
        coupled_adamw(max_grad_norm=1.0)


PATCHED = """
import torch, torchtitan
from torch import nn
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
model = nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 20, bias=False))
config = OptimizersContainer.Config(param_groups=[
    ParamGroupConfig(pattern="^1", optimizer_name="CoupledAdam",
                     optimizer_kwargs={"lr": 1e-3, "second_moment": "vocabulary"}),
    ParamGroupConfig(pattern=".*", optimizer_name="CoupledAdam", optimizer_kwargs={"lr": 1e-3}),
])
container = config.build(model_parts=[model])
model(torch.arange(20)).logsumexp(-1).sum().backward()
container.step()
state = container.optimizers[0].state
print(torchtitan.__file__, *(tuple(state[p]["exp_avg_sq"].shape) for p in model.parameters()))
"""


def test_the_patch_for_torchtitan_knows_the_name(tmp_path: Path) -> None:
    found = output_of(PATCHED, patched("torchtitan", tmp_path)).strip()
    assert found == f"{tmp_path / 'torchtitan' / '__init__.py'} (20, 4) (1, 4)"
