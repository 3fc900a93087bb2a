"""What two processes run under FSDP2: a tiny Llama by Accelerate or by Lightning, on the batches of one process."""

import os
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
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
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

    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with mock.patch.dict(os.environ, launched):
        accelerator, model, optimizer = prepared()
        train(accelerator, model, optimizer, range(3))
        accelerator.save_state(folder)
        train(accelerator, model, optimizer, range(3, STEPS))
        uninterrupted = whole(model)
        head = optimizer.param_groups[0]["params"][0]
        found = {"sharded": isinstance(head, DTensor), "row": tuple(optimizer.state[head]["exp_avg_sq"].shape)}
        accelerator, model, optimizer = prepared()
        accelerator.load_state(folder)
        train(accelerator, model, optimizer, range(3, STEPS))
        return found | {"uninterrupted": uninterrupted, "resumed": whole(model)}
