"""Accelerate alone: prepare, accumulation, clipping; and its FSDP2 on two processes."""

import fsdp2_jobs
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from coupled_adam import CoupledAdam, describe, param_groups


@pytest.mark.long
def test_fsdp2_of_accelerate_trains_and_resumes_as_one_process(processes, tmp_path) -> None:
    expected = fsdp2_jobs.in_one_process()
    for result in processes(2).run(fsdp2_jobs.by_accelerate, str(tmp_path)):
        assert result["sharded"] and result["row"] == (1, 16)
        for name, x in expected.items():
            torch.testing.assert_close(result["uninterrupted"][name], x, rtol=1e-5, atol=1e-6)
            assert torch.equal(result["resumed"][name], result["uninterrupted"][name]), name


@pytest.mark.parametrize("clipped_by", ["accelerate", "optimizer"])
def test_accumulated_and_clipped_steps_are_those_of_the_whole_batch(clipped_by: str) -> None:
    def train(micro: int) -> nn.Module:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro)
        model = fsdp2_jobs.llama()
        bound = 0.5 if clipped_by == "optimizer" else None
        optimizer = CoupledAdam(param_groups(model), lr=1e-2, max_grad_norm=bound)
        model, optimizer = accelerator.prepare(model, optimizer)
        for step in range(4):
            for part in range(micro):
                with accelerator.accumulate(model):
                    tokens = fsdp2_jobs.batch(step, part, micro)
                    accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
                    if clipped_by == "accelerate" and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
        assert "coupled over the vocabulary: lm_head.weight (67, 16)" in describe(optimizer)  # through the wrapper
        assert optimizer.state[model.lm_head.weight]["step"] == 4
        return model

    accumulated, at_once = train(4), train(1)
    for name, p in at_once.named_parameters():
        torch.testing.assert_close(accumulated.get_parameter(name), p, rtol=1e-5, atol=1e-6, msg=name)


def test_a_prepared_scheduler_keeps_the_factor_of_the_embeddings_learning_rate() -> None:
    accelerator = Accelerator(cpu=True)
    model = fsdp2_jobs.llama()
    optimizer = CoupledAdam(param_groups(model, lr=1e-2, embedding_lr_factor=10.0))
    shape = [0.0, 0.5, 1.0, 0.5, 0.25, 0.0]  # warm-up and decay
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shape.__getitem__)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    seen = []
    for step in range(5):
        tokens = fsdp2_jobs.batch(step)
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert seen == [pytest.approx([0.1 * x, 0.01 * x, 0.01 * x]) for x in shape[:5]]
