"""Checkpoints of trainers: Lightning's, with whatever lies in its hyperparameters, and those in parts."""

import argparse
import collections
import enum
import io
import os
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from torch.distributed import checkpoint
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from coupled_adam.audit.embedding_files import read_embeddings
from coupled_adam.errors import InputError

V, H = 40, 16


class Color(enum.Enum):
    RED = 1


class Options(dict[str, Any]):
    """A class of the user's own, which is not there when others read the checkpoint."""


class Model(lightning.LightningModule):
    def __init__(self, **hyperparameters: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        sizes = {"vocab_size": V, "hidden_size": H, "intermediate_size": 32}
        heads = {"num_hidden_layers": 1, "num_attention_heads": 2}
        self.net = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False))

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss: torch.Tensor = self.net(batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


class Opens:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return io.open, (str(self.path), "w")


class Calls(Opens):
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def trained(path: Path, **hyperparameters: Any) -> Model:
    model = Model(**hyperparameters)
    trainer = lightning.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path.parent,
        callbacks=[ModelCheckpoint(dirpath=path.parent), EarlyStopping("loss", strict=False), Timer()],
    )
    trainer.fit(model, DataLoader(torch.randint(0, V, (4, 6)), batch_size=2))
    trainer.save_checkpoint(path)
    return model


def test_a_checkpoint_of_lightning_is_read_whatever_its_hyperparameters_are(tmp_path: Path) -> None:
    hyperparameters = {
        "args": argparse.Namespace(layers=3, path=tmp_path),
        "color": Color.RED,
        "optimizer": torch.optim.AdamW,
        "queue": collections.deque([1, 2]),
        "default": collections.defaultdict(list, a=[1]),
        "more": AttributeDict(a=1),
        "own": Options(a=1),
        "config": LlamaConfig(),
        "activation": torch.nn.functional.relu,
        "opens": Opens(tmp_path / "opened"),
    }
    model = trained(tmp_path / "last.ckpt", **hyperparameters)
    (tmp_path / "opened").unlink(missing_ok=True)  # Lightning copies hyperparameters, which opens it
    read = read_embeddings(str(tmp_path / "last.ckpt"))
    assert read.output is not None and read.origin.kind == "pickle"
    assert torch.equal(read.input, model.net.get_input_embeddings().weight)
    assert torch.equal(read.output, model.net.lm_head.weight)
    assert not (tmp_path / "opened").exists()


def test_what_torch_forbids_is_refused_in_lightning_too_and_does_not_run(tmp_path: Path) -> None:
    content = {"pytorch-lightning_version": "2.6.0", "state_dict": {"wte.weight": torch.ones(4, 2)}}
    torch.save(content | {"hyper_parameters": {"x": Calls(tmp_path / "called")}}, tmp_path / "m.ckpt")
    with pytest.raises(InputError, match=r"could run arbitrary code when loaded \((posix|nt)\.system\)"):
        read_embeddings(str(tmp_path / "m.ckpt"))
    assert not (tmp_path / "called").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_in_parts_is_named_with_what_makes_a_file_of_it(tmp_path: Path) -> None:
    checkpoint.save({"wte.weight": torch.ones(4, 2)}, checkpoint_id=tmp_path / "parts", no_dist=True)
    with pytest.raises(InputError, match=r"torch\.distributed\.checkpoint; .* dcp_to_torch .*parts model\.pt"):
        read_embeddings(str(tmp_path / "parts"))
    dcp_to_torch_save(tmp_path / "parts", tmp_path / "model.pt")
    assert read_embeddings(str(tmp_path / "model.pt")).input.shape == (4, 2)
