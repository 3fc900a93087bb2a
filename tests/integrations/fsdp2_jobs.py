"""What two processes run under FSDP2: a tiny Llama by Accelerate or by Lightning, on the batches of one process."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from coupled_adam.integrations.transformers import OptimizerFactory, trainer_optimizer

VOCABULARY, STEPS = 67, 6  # rows that two processes cannot share evenly


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **sizes))


def batch(step: int, rank: int = 0, ranks: int = 1) -> Tensor:
    """This process's sequences of a step."""
    tokens = torch.randint(VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(step))
    return tokens[rank * 4 // ranks : (rank + 1) * 4 // ranks]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """As the Trainer builds it, before anything is wrapped."""
    args = TrainingArguments("unused", use_cpu=True, learning_rate=1e-2, weight_decay=0.1, report_to="none")
    factory, kwargs = trainer_optimizer(args)
    assert factory is OptimizerFactory
    return factory()(model, **kwargs)


def whole(model: nn.Module) -> dict[str, Tensor]:
    tensors = ((name, p.detach()) for name, p in model.named_parameters())
    return {name: (x.full_tensor() if isinstance(x, DTensor) else x).clone() for name, x in tensors}


def in_one_process() -> dict[str, Tensor]:
    model = llama()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=batch(step), labels=batch(step)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return whole(model)


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """The environment that torchrun makes, around processes that have their process group already."""
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    ours = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    ours |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "test"}
    with mock.patch.dict(os.environ, ours):
        yield


def by_accelerate(folder: str) -> dict[str, Any]:
    """Accelerate's FSDP2, saved and loaded by it half way. It offers FSDP to accelerators only, so we insist."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState

    def prepared() -> tuple[Accelerator, Any, Any]:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        model = llama()
        optimizer = optimizer_of(model)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        return accelerator, *accelerator.prepare(model, optimizer)

    def train(accelerator: Accelerator, model: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            tokens = batch(step, dist.get_rank(), dist.get_world_size())
            accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()

    with launched():
        accelerator, model, optimizer = prepared()
        train(accelerator, model, optimizer, range(3))
        accelerator.save_state(folder)
        train(accelerator, model, optimizer, range(3, STEPS))
        uninterrupted = whole(model)
        head = optimizer.param_groups[0]["params"][0]
        found = {"sharded": len(head.to_local()) < VOCABULARY, "row": tuple(optimizer.state[head]["exp_avg_sq"].shape)}
        accelerator, model, optimizer = prepared()
        accelerator.load_state(folder)
        train(accelerator, model, optimizer, range(3, STEPS))
        return found | {"uninterrupted": uninterrupted, "resumed": whole(model)}


def by_lightning(folder: str) -> dict[str, Any]:
    """Lightning's ModelParallelStrategy, with the plan that FSDP2 shards by; saved and loaded by it half way."""
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard
    from torch.utils.data import DataLoader

    from coupled_adam import CoupledAdam, param_groups

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def configure_model(self) -> None:
            mesh = self.device_mesh["data_parallel"]
            for layer in self.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

        def training_step(self, tokens: Tensor, index: int) -> Tensor:
            return self.model(input_ids=tokens, labels=tokens).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return CoupledAdam(param_groups(self.model, weight_decay=0.1), lr=1e-2, max_grad_norm=0.5)

    def train(epochs: int, start: str | None = None) -> tuple[Any, Any]:
        module = Module()
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=dist.get_world_size(),
            strategy=ModelParallelStrategy(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1),
            max_epochs=epochs,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
            logger=False,
        )
        batches = [batch(step, dist.get_rank(), dist.get_world_size()) for step in range(STEPS // 2)]
        trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=start)
        return trainer, module

    with launched():
        trainer, _ = train(1)
        trainer.save_checkpoint(f"{folder}/half.ckpt")
        trainer, resumed = train(2, f"{folder}/half.ckpt")
        head = trainer.optimizers[0].param_groups[0]["params"][0]
        found = {
            "sharded": len(head.to_local()) < VOCABULARY,
            "row": tuple(trainer.optimizers[0].state[head]["exp_avg_sq"].shape),
        }
        return found | {"resumed": whole(resumed.model), "uninterrupted": whole(train(2)[1].model)}
