"""With DeepSpeed itself: without ZeRO a step is that of one process, with it the remedy is told. Run by
tools/check_integrations."""

import os
import re
import tempfile
from collections.abc import Callable
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}

import deepspeed
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator, DeepSpeedPlugin
from fsdp2_jobs import STEPS, batch, in_one_process, launched, llama, optimizer_of, whole
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from coupled_adam import CoupledAdam, param_groups
from coupled_adam.integrations.transformers import trainer_optimizer
from coupled_adam.monitor import health


def run(rank: int, job: Callable[..., Any], folder: str, arguments: tuple[Any, ...]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with launched():
        deepspeed.init_distributed("gloo")
        torch.save(job(folder, *arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def in_two_processes(job: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What the job returns in each of them."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (job, folder, arguments), nprocs=2)
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]


def configuration(stage: int, **options: Any) -> dict[str, Any]:
    batches = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 0.5}
    return batches | {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True} | options


def engine_of(stage: int, **options: Any) -> Any:
    model = llama()
    return deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=configuration(stage, **options))[0]


def train(engine: Any, steps: range) -> None:
    for step in steps:
        tokens = batch(step, dist.get_rank(), 2)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()


def without_zero(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    engine = engine_of(0, **options)
    train(engine, range(3))
    engine.save_checkpoint(f"{folder}/saved")
    train(engine, range(3, STEPS))
    resumed = engine_of(0, **options)
    resumed.load_checkpoint(f"{folder}/saved")
    train(resumed, range(3, STEPS))
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    (head,) = inner.param_groups[0]["params"]
    return {
        "row": tuple(inner.state[head]["exp_avg_sq"].shape),
        "uninterrupted": whole(engine.module),
        "resumed": whole(resumed.module),
    }


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_without_zero_two_processes_train_and_resume_as_one(precision: str) -> None:
    start, expected = whole(llama()), in_one_process()
    for found in in_two_processes(without_zero, {"bf16": {"enabled": True}} if precision == "bf16" else {}):
        assert found["row"] == (1, 16)
        for name, x in expected.items():
            assert torch.equal(found["resumed"][name], found["uninterrupted"][name]), name
            if precision == "float32":
                torch.testing.assert_close(found["uninterrupted"][name], x, rtol=1e-5, atol=1e-6, msg=name)
        moved, wanted = (x["lm_head.weight"].float() - start["lm_head.weight"] for x in (found["resumed"], expected))
        assert nn.functional.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0) > 0.95


def told(attempt: Callable[[], Any]) -> str:
    with pytest.raises((RuntimeError, ValueError)) as error:
        attempt()
    return str(error.value)


def with_zero(folder: str, stage: int, options: dict[str, Any]) -> str:
    engine = engine_of(stage, **options)
    return told(lambda: train(engine, range(1)))


@pytest.mark.parametrize("options", [{}, {"bf16": {"enabled": True}}], ids=["float32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_refused_with_the_remedy(stage: int, options: dict[str, Any]) -> None:
    for message in in_two_processes(with_zero, stage, options):
        assert re.search(r"'lm_head.weight' was flattened .*DeepSpeed ZeRO.*no rows to couple.*Use FSDP2", message)


def under_zero_3(folder: str) -> list[str]:
    with deepspeed.zero.Init(config_dict_or_path=configuration(3)):
        model = llama()
    return [told(lambda: param_groups(model)), told(lambda: health(model))]


def test_a_model_built_under_zero_3_is_refused_with_the_remedy() -> None:
    for groups, figures in in_two_processes(under_zero_3):
        assert re.search(r"lm_head.weight \(0,\).*DeepSpeed ZeRO.*FSDP2 keeps matrices", groups)
        assert re.search(r"not of shape \(0,\).*DeepSpeed ZeRO-3.*gather the matrix", figures)


def by_the_trainer(folder: str, stage: int) -> str | tuple[Any, dict[str, Tensor]]:
    args = TrainingArguments(
        f"{folder}/run",
        deepspeed=configuration(stage),
        per_device_train_batch_size=2,
        max_grad_norm=0.5,
        max_steps=3,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    rows = [{"input_ids": row, "labels": row} for step in range(3) for row in batch(step)]
    trainer = Trainer(llama(), args, train_dataset=rows, optimizer_cls_and_kwargs=trainer_optimizer(args))
    if stage:
        return told(trainer.train)
    trainer.train()
    head = trainer.model.lm_head.weight
    optimizer = trainer.optimizer.optimizer
    return tuple(optimizer.state[head]["exp_avg_sq"].shape), whole(trainer.model)


def test_the_trainer_couples_without_zero_and_tells_the_remedy_with_it() -> None:
    (row, weights), (_, others) = in_two_processes(by_the_trainer, 0)
    assert row == (1, 16) and not torch.equal(weights["lm_head.weight"], llama().lm_head.weight)
    assert all(torch.equal(others[name], x) for name, x in weights.items())
    for message in in_two_processes(by_the_trainer, 2):
        assert re.search("DeepSpeed ZeRO.*Use FSDP2", message)


def by_accelerate(folder: str, stage: int) -> str:
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=configuration(stage)))
    model = llama()
    loader = DataLoader(batch(0), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, CoupledAdam(param_groups(model), lr=1e-2), loader)

    def step() -> None:
        tokens = batch(0, dist.get_rank(), 2)
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()

    if stage:
        return told(step)
    step()
    return str(tuple(model.optimizer.state[model.module.lm_head.weight]["exp_avg_sq"].shape))


def test_accelerate_couples_without_zero_and_tells_the_remedy_with_it() -> None:
    assert in_two_processes(by_accelerate, 0) == ["(1, 16)", "(1, 16)"]
    for message in in_two_processes(by_accelerate, 2):
        assert re.search("DeepSpeed ZeRO.*Use FSDP2", message)
