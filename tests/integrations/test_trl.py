"""Trainers of TRL on a tiny Llama: one that takes the optimizer when it is built, and one that takes it afterwards."""

import pytest
import torch
from datasets import Dataset
from fsdp2_jobs import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from coupled_adam.integrations.transformers import trainer_optimizer

pytestmark = pytest.mark.long  # to import

OPTIONS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<end>", "<unk>", *(f"w{i}" for i in range(60))]
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")


def assert_coupled(trainer) -> None:
    head = trainer.model.lm_head.weight
    assert trainer.optimizer.optimizer.param_groups[0]["params"] == [head]
    assert trainer.optimizer.state[head]["exp_avg_sq"].shape == (1, 16)
    assert trainer.optimizer.state[head]["step"] == 3
    assert not torch.equal(head, llama().lm_head.weight)


def test_sft_takes_it_when_it_is_built(tmp_path, tokenizer) -> None:
    args = SFTConfig(str(tmp_path), max_length=8, **OPTIONS)
    text = Dataset.from_dict({"text": [f"w{i} w{i + 1} w{i + 2}" for i in range(8)]})
    trainer = SFTTrainer(
        llama(), args, train_dataset=text, processing_class=tokenizer, optimizer_cls_and_kwargs=trainer_optimizer(args)
    )
    trainer.train()
    assert_coupled(trainer)


def test_sft_keeps_the_factor_of_the_embeddings_learning_rate(tmp_path, tokenizer) -> None:
    rates = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs) -> None:
            rates.append([group["lr"] for group in optimizer.param_groups])

    args = SFTConfig(str(tmp_path), max_length=8, lr_scheduler_type="cosine", warmup_steps=1, **OPTIONS)
    text = Dataset.from_dict({"text": [f"w{i} w{i + 1} w{i + 2}" for i in range(8)]})
    chosen = trainer_optimizer(args, embedding_lr_factor=10.0)
    trainer = SFTTrainer(llama(), args, train_dataset=text, processing_class=tokenizer, optimizer_cls_and_kwargs=chosen)
    trainer.add_callback(Look())
    trainer.train()
    assert rates == [pytest.approx([10 * lr, lr, lr]) for lr in (0, 1e-2, 5e-3)]


def test_dpo_takes_it_afterwards(tmp_path, tokenizer) -> None:
    args = DPOConfig(str(tmp_path), max_length=8, **OPTIONS)
    pairs = Dataset.from_dict({"prompt": ["w1 w2"] * 8, "chosen": ["w3 w4"] * 8, "rejected": ["w5"] * 8})
    trainer = DPOTrainer(llama(), llama(), args=args, train_dataset=pairs, processing_class=tokenizer)
    trainer.optimizer_cls_and_kwargs = trainer_optimizer(trainer.args)
    trainer.train()
    assert_coupled(trainer)


def test_grpo_takes_it_afterwards(tmp_path, tokenizer) -> None:
    def reward(completions, **columns) -> list[float]:
        return [float(i % 2) for i, _ in enumerate(completions)]  # no two of a prompt alike: there is an advantage

    args = GRPOConfig(str(tmp_path), num_generations=2, max_completion_length=4, **OPTIONS)
    prompts = Dataset.from_dict({"prompt": ["w1 w2", "w3 w4"] * 4})
    trainer = GRPOTrainer(llama(), reward, args=args, train_dataset=prompts, processing_class=tokenizer)
    trainer.optimizer_cls_and_kwargs = trainer_optimizer(trainer.args)
    trainer.train()
    assert_coupled(trainer)


def test_a_reward_model_has_nothing_to_couple_and_trains(tmp_path, tokenizer) -> None:
    config = llama().config
    config.num_labels, config.pad_token_id = 1, 0
    args = RewardConfig(str(tmp_path), max_length=8, **OPTIONS)
    pairs = Dataset.from_dict({"chosen": ["w1 w2 w3 w4"] * 8, "rejected": ["w1 w2 w5"] * 8})
    chosen = trainer_optimizer(args)
    model = LlamaForSequenceClassification(config)
    before = model.score.weight.detach().clone()
    trainer = RewardTrainer(
        model, args, train_dataset=pairs, processing_class=tokenizer, optimizer_cls_and_kwargs=chosen
    )
    with pytest.warns(UserWarning, match="nothing is coupled.*LlamaForSequenceClassification has no output embedding"):
        trainer.train()
    assert not torch.equal(model.score.weight, before)
