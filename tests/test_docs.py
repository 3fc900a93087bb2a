"""The code in the README and the documentation runs as it stands there."""

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from coupled_adam import Adams_ZeRO, CoupledAdam, param_groups

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE))
]


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def names(tmp_path: Path) -> dict[str, Any]:
    """What the text around the blocks speaks of."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=120, tie_word_embeddings=False, **sizes))
    model.save_pretrained(tmp_path / "model")
    model.embedding = model.get_input_embeddings()
    tokens = torch.randint(120, (2, 8))
    batch = {"input_ids": tokens, "labels": tokens}
    dataset = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(str(tmp_path / "trained"), report_to="none", use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=dataset)
    optimizer = CoupledAdam(param_groups(model))
    model(**batch).loss.backward()
    optimizer.step()
    model.zero_grad()
    saved = optimizer.state_dict()
    checkpoint.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path / "checkpoint")
    other_parameters = [p for p in model.parameters() if p is not model.embedding.weight]
    return locals() | {
        "batches": [batch],
        "dataloader": DataLoader([batch], batch_size=None),
        "Adams_ZeRO": Adams_ZeRO,
        "CoupledAdam": CoupledAdam,
        "param_groups": param_groups,
        "fully_shard": fully_shard,
        "mesh": init_device_mesh("cpu", (1,)),
    }


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 7


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_runs(block: str, alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = names(tmp_path)
    monkeypatch.chdir(tmp_path)  # what a block saves
    block = re.sub(r"^model = \.\.\..*\n", "", block, flags=re.MULTILINE)
    block = re.sub(r'"[\w./-]+\.gguf"', repr(str(tmp_path / "model")), block)
    exec(compile(block, "a block of the documentation", "exec"), given)


def test_links_lead_somewhere() -> None:
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / "docs" / "api").glob("*.md")]
    missing = [
        (page.name, target)
        for page in pages
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert missing == []


def test_every_file_of_the_optimizers_stands_in_the_map() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    source = ROOT / "src" / "coupled_adam"
    files = [f"optim/{path.name}" for path in (source / "optim").glob("[!_]*.py")]
    rooms = [path.name for path in source.glob("[!_]*.py")] + [
        f"{path.parent.name}/" for path in source.glob("*/__init__.py")
    ]
    assert [name for name in files + rooms if f"`{name}`" not in text] == []
