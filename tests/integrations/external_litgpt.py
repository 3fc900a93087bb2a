"""With litgpt and LightningCLI themselves, which hand over bare parameters. Run by tools/check_integrations."""

import sys
from pathlib import Path
from unittest import mock

import lightning
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from litgpt import GPT, Config
from litgpt.pretrain import get_lr
from litgpt.utils import instantiate_torch_optimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from coupled_adam.integrations.bare_parameters import VocabularyCoupledAdam

CLASS = "coupled_adam.integrations.bare_parameters.VocabularyCoupledAdam"


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(Config(block_size=16, n_layer=1, n_head=2, n_embd=16, padded_vocab_size=64, vocab_size=60))


def test_litgpt_builds_it_from_its_settings_and_couples_the_head() -> None:
    model = gpt()
    arguments = {"vocabulary_size": 64, "which": "first", "lr": 1e-2, "weight_decay": 0.1, "betas": [0.9, 0.95]}
    settings = {"class_path": CLASS, "init_args": arguments}
    optimizer = instantiate_torch_optimizer(settings, model.parameters(), fused=False)
    assert isinstance(optimizer, VocabularyCoupledAdam)
    assert optimizer.param_groups[0]["params"] == [model.lm_head.weight]
    for step in range(3):
        for group in optimizer.param_groups:  # as its pretrain.py does it
            group["lr"] = optimizer.defaults["lr"] / (step + 1)
        tokens = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    assert optimizer.state[model.lm_head.weight]["exp_avg_sq"].shape == (1, 16)
    with pytest.raises(ValueError, match="several matrices have that many rows"):
        arguments.pop("which")
        instantiate_torch_optimizer({"class_path": CLASS, "init_args": arguments}, model.parameters())


def test_longer_steps_of_the_embedding_survive_the_loop_of_litgpt() -> None:
    """It sets one rate for all groups."""
    moved = []
    for factor in (1.0, 10.0):
        model = gpt()
        arguments = {"vocabulary_size": 64, "which": "first", "lr": 1e-4, "embedding_lr_factor": factor}
        optimizer = instantiate_torch_optimizer({"class_path": CLASS, "init_args": arguments}, model.parameters())
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for group in optimizer.param_groups:
            group["lr"] = get_lr(optimizer.defaults["lr"], it=1, warmup_iters=2, max_iters=4, min_lr=0.0)
        tokens = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(0))
        nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        moved.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    for name, step in moved[0].items():
        expected = 10 * step if name == "lm_head.weight" else step
        torch.testing.assert_close(moved[1][name], expected, rtol=1e-2, atol=2e-7, msg=name)


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = gpt()

    def training_step(self, tokens: Tensor, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def train_dataloader(self) -> DataLoader:
        batches = [torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(step)) for step in range(4)]
        return DataLoader(batches, batch_size=None)


def test_lightning_cli(tmp_path: Path) -> None:
    settings = [
        "--optimizer",
        CLASS,
        "--optimizer.vocabulary_size",
        "64",
        "--optimizer.which",
        "first",
        "--optimizer.lr",
        "0.01",
    ]
    quiet = ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false", "--trainer.accelerator", "cpu"]
    trainer = ["--trainer.max_epochs", "1", "--trainer.default_root_dir", str(tmp_path), *quiet]
    with mock.patch.object(sys, "argv", ["program", "fit", *trainer, *settings]):
        cli = LightningCLI(Module, save_config_callback=None)
    (optimizer,) = cli.trainer.optimizers
    head = cli.model.model.lm_head.weight
    assert optimizer.defaults["lr"] == 0.01
    assert optimizer.param_groups[0]["params"] == [head] and optimizer.state[head]["step"] == 4
