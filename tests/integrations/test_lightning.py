"""Lightning and Fabric: no wrapper of ours, and what stands in the documentation trains, clips and resumes."""

from pathlib import Path
from typing import Any

import fsdp2_jobs
import lightning
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader

from coupled_adam import CoupledAdam, describe, param_groups

STEPS = fsdp2_jobs.STEPS


class Module(lightning.LightningModule):
    """As in the documentation."""

    def __init__(self, max_grad_norm: float | None = None) -> None:
        super().__init__()
        self.model, self.max_grad_norm = fsdp2_jobs.llama(), max_grad_norm

    def training_step(self, tokens: Tensor, index: int) -> Tensor:
        return self.model(input_ids=tokens, labels=tokens).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return CoupledAdam(param_groups(self.model, weight_decay=0.1), lr=1e-2, max_grad_norm=self.max_grad_norm)


def batches(micro: int = 1) -> DataLoader:
    return DataLoader([fsdp2_jobs.batch(s, i, micro) for s in range(STEPS) for i in range(micro)], batch_size=None)


def trainer(folder: Path, **options: Any) -> lightning.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return lightning.Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, **{"max_epochs": 1} | quiet | options
    )


def assert_close(model: nn.Module, expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=10 * tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("clipped_by", ["lightning", "optimizer"])
def test_a_lightning_module_trains_as_a_loop_does(tmp_path, micro, clipped_by) -> None:
    bound = {"lightning": (None, 0.5), "optimizer": (0.5, None)}[clipped_by]
    module = Module(max_grad_norm=bound[0])
    options = {"accumulate_grad_batches": micro, "gradient_clip_val": bound[1], "enable_checkpointing": False}
    trained = trainer(tmp_path, **options)
    trained.fit(module, batches(micro))
    assert_close(module.model, fsdp2_jobs.in_one_process())
    assert "lm_head.weight (67, 16)" in describe(trained.optimizers[0])


def test_a_scheduler_under_lightning_keeps_the_factor_of_the_embeddings_learning_rate(tmp_path) -> None:
    class Scheduled(Module):
        def configure_optimizers(self):
            optimizer = CoupledAdam(param_groups(self.model, lr=1e-2, embedding_lr_factor=10.0))
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step, 2) / 2 * 0.9**step)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        def on_train_batch_end(self, outputs, batch, index) -> None:
            seen.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])

    seen: list[list[float]] = []
    trainer(tmp_path, enable_checkpointing=False).fit(Scheduled(), batches())
    assert seen == [pytest.approx([10 * rates[1], rates[1], rates[1]]) for rates in seen]
    assert len({rates[0] for rates in seen}) == STEPS


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_lightning_run_resumes_as_if_nothing_had_been(tmp_path, precision) -> None:
    whole, half, resumed = Module(), Module(), Module()
    trainer(tmp_path, precision=precision, max_epochs=2, enable_checkpointing=False).fit(whole, batches())
    first = trainer(tmp_path, precision=precision)
    first.fit(half, batches())
    first.save_checkpoint(tmp_path / "half.ckpt")
    second = trainer(tmp_path, precision=precision, max_epochs=2)
    second.fit(resumed, batches(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    for name, p in whole.named_parameters():
        assert torch.equal(resumed.get_parameter(name), p), name
    head = resumed.model.lm_head.weight
    assert not torch.equal(head, half.model.lm_head.weight)
    assert second.optimizers[0].state[head]["step"] == 2 * STEPS
    assert second.optimizers[0].state[head]["exp_avg_sq"].dtype == torch.float32


def test_the_module_itself_is_no_model_and_says_so() -> None:
    with pytest.raises(ValueError, match=r"Module does not say what its output embedding is.*model.lm_head.weight"):
        param_groups(Module())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric_trains_and_resumes(tmp_path, precision) -> None:
    def setup() -> tuple[Fabric, Any, Any]:
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        model = fsdp2_jobs.llama()
        optimizer = CoupledAdam(param_groups(model, weight_decay=0.1), lr=1e-2)
        return fabric, *fabric.setup(model, optimizer)

    def train(fabric: Fabric, model: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            for part in range(2):
                tokens = fsdp2_jobs.batch(step, part, 2)
                fabric.backward(model(input_ids=tokens, labels=tokens).loss / 2)
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()

    fabric, model, optimizer = setup()
    train(fabric, model, optimizer, range(3))
    fabric.save(tmp_path / "half.ckpt", {"model": model, "optimizer": optimizer})
    train(fabric, model, optimizer, range(3, STEPS))
    if precision == "32-true":
        assert_close(model.module, fsdp2_jobs.in_one_process())
    assert "lm_head.weight (67, 16)" in describe(optimizer)
    fabric, resumed, optimizer = setup()
    fabric.load(tmp_path / "half.ckpt", {"model": resumed, "optimizer": optimizer})
    train(fabric, resumed, optimizer, range(3, STEPS))
    for name, p in model.named_parameters():
        assert torch.equal(resumed.get_parameter(name), p), name


@pytest.mark.long
def test_fsdp2_of_lightning_trains_and_resumes_as_one_process(processes, tmp_path) -> None:
    model = fsdp2_jobs.llama()
    optimizer = CoupledAdam(param_groups(model, weight_decay=0.1), lr=1e-2, max_grad_norm=0.5)
    for step in [*range(STEPS // 2)] * 2:
        optimizer.zero_grad()
        tokens = fsdp2_jobs.batch(step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    for result in processes(2).run(fsdp2_jobs.by_lightning, str(tmp_path)):
        assert result["sharded"] and result["row"] == (1, 16)
        assert_close(model, result["uninterrupted"])
        for name, x in result["uninterrupted"].items():
            assert torch.equal(result["resumed"][name], x), name
