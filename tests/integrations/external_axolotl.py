"""With axolotl itself: its plugin manager and its trainer. Run by tools/check_integrations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.core.training_args import AxolotlTrainingArguments
from axolotl.integrations.base import PluginManager
from axolotl.integrations.config import merge_input_args
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from patched import output_of, patched
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=67, tie_word_embeddings=False, **sizes))


class Rates(TrainerCallback):
    """Notes the learning rates of every step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
        self.seen.append([group["lr"] for group in optimizer.param_groups])


def trainer(folder: Path, **settings: Any) -> AxolotlTrainer:
    tokens = torch.randint(67, (32, 8), generator=torch.Generator().manual_seed(1))
    given = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    args = AxolotlTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", weight_decay=0.1, gradient_accumulation_steps=2, **given
    )
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})
    made = AxolotlTrainer(model=llama(), args=args, train_dataset=data)
    manager = PluginManager.get_instance()
    manager.register("coupled_adam.integrations.axolotl.CoupledAdamPlugin")
    manager.post_trainer_create(DictDefault(settings), made)  # as axolotl.train does it
    return made


def test_the_plugin_couples_and_resumes(tmp_path: Path) -> None:
    whole = trainer(tmp_path)
    whole.train()
    head = whole.model.lm_head.weight
    optimizer = whole.optimizer.optimizer
    assert optimizer.param_groups[0]["params"] == [head] and optimizer.state[head]["exp_avg_sq"].shape == (1, 16)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.1, 0.0]
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, p in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), p), name


def test_the_embedding_has_a_multiple_of_the_learning_rate_throughout_the_schedule(tmp_path: Path) -> None:
    manager = PluginManager.get_instance()
    manager.register("coupled_adam.integrations.axolotl.CoupledAdamPlugin")
    settings = {
        "base_model": "none",
        "datasets": [{"path": "none", "type": "alpaca"}],
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "plugins": ["coupled_adam.integrations.axolotl.CoupledAdamPlugin"],
        "capabilities": {"bf16": False, "fp8": False, "n_gpu": 0, "compute_capability": "sm_80"},
        "env_capabilities": {"torch_version": "2.11.0"},
    }
    checked = merge_input_args()[0](**settings, embedding_lr_factor=10.0)
    assert checked.embedding_lr_factor == 10.0, "axolotl keeps the key"
    with pytest.raises(ValueError, match="embedding_lr_factor"):
        merge_input_args()[0](**settings, embedding_lr_factor=0.0)
    for schedule in ("cosine", "rex"):
        made = trainer(tmp_path, embedding_lr_factor=10.0)
        made.args.warmup_steps = 2
        made.args.alternate_lr_scheduler_type = "rex" if schedule == "rex" else None
        made.add_callback(rates := Rates())
        made.train()
        assert rates.seen == [pytest.approx([10 * lr, lr, lr]) for _, lr, _ in rates.seen]
        assert len({lr for lr, *_ in rates.seen}) > 3


def test_a_schedule_that_would_lose_the_factor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one_cycle sets one learning rate for all.*embedding_lr_factor=10"):
        trainer(tmp_path, embedding_lr_factor=10.0, lr_scheduler="one_cycle")


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"embedding_lr would have no effect.*use embedding_lr_factor"):
        trainer(tmp_path, embedding_lr=1e-4)


PATCHED = """
import axolotl, torch
from types import SimpleNamespace
from axolotl.core.builders.base import TrainerBuilderBase
from axolotl.utils.dict import DictDefault
from transformers import LlamaConfig, LlamaForCausalLM
builder = SimpleNamespace(cfg=DictDefault(optimizer="coupled_adam"))
arguments, chosen = {"learning_rate": 1e-3, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95}, {}
TrainerBuilderBase._configure_optimizer(builder, arguments, chosen)
factory, options = chosen["optimizer_cls_and_kwargs"]
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=67, tie_word_embeddings=False, **sizes))
optimizer = factory()(model, None, **options)
model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
optimizer.step()
shape = tuple(optimizer.state[model.lm_head.weight]["exp_avg_sq"].shape)
print(axolotl.__path__[0], shape, optimizer.defaults["betas"])
"""


def test_the_patch_for_axolotl_knows_the_name(tmp_path: Path) -> None:
    found = output_of(PATCHED, patched("axolotl", tmp_path)).strip()
    assert found == f"{tmp_path / 'axolotl'} (1, 16) (0.9, 0.95)"
