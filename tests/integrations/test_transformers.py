"""The real Trainer of transformers, of TRL and with PEFT, on a tiny Llama."""

import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from coupled_adam import Adams, CoupledAdam, center_
from coupled_adam.integrations.transformers import OptimizerFactory, resume_from_adamw, trainer_optimizer

VOCABULARY, WIDTH = 64, 16
SIZES = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=tied, **SIZES))


def data(count: int = 64) -> list[dict[str, Tensor]]:
    tokens = torch.randint(VOCABULARY, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": x, "labels": x} for x in tokens]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    given = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "warmup_steps": 2,
        "save_steps": 3,
        "logging_steps": 1,
    }
    return TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **given | options)


def trainer(
    folder: Path, model: nn.Module | None = None, ours: dict[str, Any] | None = None, **options: Any
) -> Trainer:
    """A Trainer with Coupled Adam, or with its own AdamW if ``ours`` is None."""
    args = arguments(folder, **options)
    chosen = None if ours is None else trainer_optimizer(args, **ours)
    return Trainer(model or llama(), args, train_dataset=data(), optimizer_cls_and_kwargs=chosen)


def inner(trained: Trainer) -> Any:
    """The optimizer inside the wrapper of accelerate."""
    return trained.optimizer.optimizer


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, x in expected.items() if not torch.equal(found[name], x)] == []


class Killed(TrainerCallback):
    """Ends the process, or as good as that, after a step."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt


def killed(trained: Trainer, after: int = 4) -> None:
    trained.add_callback(Killed(after))
    with pytest.raises(KeyboardInterrupt):
        trained.train()


def step_by_hand(model: nn.Module, args: TrainingArguments, batches: list[list[dict[str, Tensor]]]) -> None:
    """What the Trainer should do: mean gradient of the micro-batches, clipped, one step by ``CoupledAdam``."""
    head = model.get_output_embeddings().weight
    named = list(model.named_parameters())
    groups = [
        {"params": [head], "second_moment": "vocabulary", "weight_decay": 0.0},
        {"params": [p for _, p in named if p is not head and p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for _, p in named if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = CoupledAdam(groups, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)
    for step, micro in enumerate(batches):
        optimizer.zero_grad()
        for rows in micro:
            tokens = torch.stack([row["input_ids"] for row in rows])
            (model(input_ids=tokens, labels=tokens).loss / len(micro)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 - step / len(batches))
        optimizer.step()


@pytest.mark.parametrize("accumulated", [1, 3])
def test_it_trains_as_written_out_by_hand_with_the_arguments_of_the_trainer(tmp_path, accumulated) -> None:
    options = {"max_steps": 4, "warmup_steps": 0, "save_strategy": "no", "gradient_accumulation_steps": accumulated}
    trained = trainer(tmp_path, ours={}, max_grad_norm=0.5, train_sampling_strategy="sequential", **options)
    trained.train()
    rows, model = data(), llama()
    micro = [rows[i : i + 2] for i in range(0, 8 * accumulated, 2)]
    step_by_hand(model, trained.args, [micro[i : i + accumulated] for i in range(0, len(micro), accumulated)])
    for name, p in trained.model.named_parameters():
        torch.testing.assert_close(
            p, model.get_parameter(name), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("tied", "bf16"), [(False, False), (True, True)])
def test_a_killed_run_resumes_as_if_nothing_had_been(tmp_path, tied, bf16) -> None:
    whole = trainer(tmp_path / "whole", llama(tied), ours={}, bf16=bf16)
    whole.train()
    killed(trainer(tmp_path / "killed", llama(tied), ours={}, bf16=bf16))
    resumed = trainer(tmp_path / "killed", llama(tied), ours={}, bf16=bf16)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(weights(resumed.model), weights(whole.model))
    head = resumed.model.get_output_embeddings().weight
    state = inner(resumed).state[head]
    assert state["exp_avg_sq"].shape == (1, WIDTH) and state["exp_avg_sq"].dtype == torch.float32
    assert not torch.equal(head, llama(tied).get_output_embeddings().weight)


def test_adams_and_more_options(tmp_path) -> None:
    whole = trainer(tmp_path, ours={"optimizer": Adams, "coupling_scale": 0.25}, max_grad_norm=0)
    whole.train()
    optimizer = inner(whole)
    assert isinstance(optimizer, Adams) and optimizer.param_groups[0]["coupling_scale"] == 0.25
    assert optimizer.state[whole.model.model.layers[0].mlp.up_proj.weight]["u"].shape == (32,)


class Center(TrainerCallback):
    """That of docs/integrations.md."""

    def on_optimizer_step(self, args, state, control, model=None, **others):
        center_(model.get_output_embeddings().weight)


@pytest.mark.parametrize("ours", [{"center": True}, None])
def test_the_output_embedding_is_centered_by_our_step_or_by_a_callback_after_another(tmp_path, ours) -> None:
    shifted = llama()
    with torch.no_grad():
        shifted.lm_head.weight += 1
    whole = trainer(tmp_path, shifted, ours=ours)
    if ours is None:
        whole.add_callback(Center())
    whole.train()
    assert whole.model.lm_head.weight.detach().mean(0).abs().max() < 1e-6


class Rates(TrainerCallback):
    """Notes the learning rates of every step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs) -> None:
        self.seen.append([group["lr"] for group in optimizer.param_groups])


SCHEDULES = ["linear", "cosine", "polynomial", "cosine_with_min_lr", "warmup_stable_decay", "inverse_sqrt"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_embedding_has_a_multiple_of_the_learning_rate_throughout_the_schedule(tmp_path, schedule) -> None:
    more = {
        "cosine_with_min_lr": {"min_lr": 1e-3},
        "warmup_stable_decay": {"num_decay_steps": 2},
        "polynomial": {"lr_end": 1e-4},
    }.get(schedule, {})
    options = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": more, "save_strategy": "no"}
    seen = []
    for factor in (10.0, None):
        whole = trainer(tmp_path, ours={"embedding_lr_factor": factor}, **options)
        whole.add_callback(rates := Rates())
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*factor")
            whole.train()
        seen.append(rates.seen)
    plain = [step[0] for step in seen[1]]
    assert plain[0] == 0 and plain[1] < plain[2] > plain[5], "warm-up and decay"
    assert seen[0] == [pytest.approx([10 * lr, lr, lr]) for lr in plain]


@pytest.mark.parametrize("optimizer", [CoupledAdam, Adams])
@pytest.mark.parametrize("tied", [False, True])
def test_a_run_with_a_factor_resumes_with_it(tmp_path, tied, optimizer) -> None:
    ours = {"optimizer": optimizer, "embedding_lr_factor": 30.0}
    whole = trainer(tmp_path / "whole", llama(tied), ours=ours)
    whole.train()
    killed(trainer(tmp_path / "killed", llama(tied), ours=ours))
    resumed = trainer(tmp_path / "killed", llama(tied), ours=ours)
    resumed.add_callback(rates := Rates())
    resumed.train(resume_from_checkpoint=True)
    assert_equal(weights(resumed.model), weights(whole.model))
    assert [step[0] / step[1] for step in rates.seen] == pytest.approx([30] * 3)


def test_a_run_of_the_trainers_adamw_goes_on_with_another_rate_for_the_embedding(tmp_path) -> None:
    killed(trainer(tmp_path))
    switched = trainer(tmp_path, ours={"embedding_lr_factor": 10.0})
    resume_from_adamw(switched)
    switched.add_callback(rates := Rates())
    switched.train(resume_from_checkpoint=True)
    expected = [0.0075, 0.005, 0.0025]
    assert rates.seen == [pytest.approx([10 * lr, lr, lr]) for lr in expected]
    again = trainer(tmp_path, ours={"embedding_lr_factor": 10.0}, max_steps=8, save_strategy="no")
    resume_from_adamw(again)  # does no harm to a checkpoint that has the factor
    again.add_callback(rates := Rates())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [step[0] / step[1] for step in rates.seen] == pytest.approx([10] * len(rates.seen))


@pytest.mark.parametrize(("factor", "error"), [(0, ValueError), (-1.0, ValueError), ("10", TypeError)])
def test_a_factor_that_cannot_be_is_refused_before_the_model_is_there(tmp_path, factor, error) -> None:
    with pytest.raises(error, match="Invalid embedding_lr_factor"):
        trainer_optimizer(arguments(tmp_path), embedding_lr_factor=factor)


def test_a_factor_for_a_model_without_an_output_embedding_is_refused(tmp_path) -> None:
    args = arguments(tmp_path, save_strategy="no")
    given = trainer_optimizer(args, embedding_lr_factor=10.0)
    trained = Trainer(classifier("bert"), args, train_dataset=data(), optimizer_cls_and_kwargs=given)
    message = "embedding_lr_factor=10 has no effect: nothing in BertForSequenceClassification is coupled"
    with pytest.raises(ValueError, match=message), pytest.warns(UserWarning, match="nothing is coupled"):
        trained.train()


def test_a_run_of_the_trainers_adamw_goes_on_with_coupled_adam(tmp_path) -> None:
    killed(trainer(tmp_path))
    saved = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    model = llama()
    decayed = [n for n, p in model.named_parameters() if "norm" not in n]
    position = dict(zip([*decayed, *(n for n, _ in model.named_parameters() if "norm" in n)], range(100), strict=False))
    switched = trainer(tmp_path, ours={})
    resume_from_adamw(switched)
    rates = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer, **kwargs) -> None:
            for name, p in switched.model.named_parameters():
                state_of = optimizer.state[p]
                expected = saved["state"][position[name]]
                assert torch.equal(state_of["exp_avg"], expected["exp_avg"]), name
                square = expected["exp_avg_sq"]
                if name == "lm_head.weight":
                    square = square.mean(0, keepdim=True)
                torch.testing.assert_close(state_of["exp_avg_sq"], square, msg=name)
                assert state_of["step"] == 3

        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs) -> None:
            rates.append([group["lr"] for group in optimizer.param_groups])

    switched.add_callback(Look())
    switched.train(resume_from_checkpoint=True)
    # 1e-2 after two steps of warmup, then linearly to 0 at step 6; the steps after the third are 3, 4, 5.
    assert [rate[0] for rate in rates] == pytest.approx([0.0075, 0.005, 0.0025])
    assert all(len(rate) == 3 and len(set(rate)) == 1 for rate in rates)
    assert [g["weight_decay"] for g in inner(switched).param_groups] == [0.0, 0.1, 0.0]
    again = trainer(tmp_path, ours={}, max_steps=8, save_strategy="no")
    resume_from_adamw(again)  # does no harm to a checkpoint of Coupled Adam
    again.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_the_trainers_adamw_is_refused_with_the_remedy(tmp_path) -> None:
    killed(trainer(tmp_path))
    with pytest.raises(ValueError, match=r"resume_from_adamw\(trainer\) before trainer.train"):
        trainer(tmp_path, ours={}).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="trainer_optimizer"):
        resume_from_adamw(trainer(tmp_path))


def classifier(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **SIZES))
    llama = LlamaForSequenceClassification(LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, **SIZES))
    return llama if kind == "llama" else get_peft_model(llama, LoraConfig(TaskType.SEQ_CLS, r=2))


@pytest.mark.parametrize("optimizer", [CoupledAdam, Adams])
@pytest.mark.parametrize("kind", ["bert", "llama", "peft"])
def test_a_classifier_trains_with_one_warning(tmp_path, kind, optimizer) -> None:
    rows = [{**row, "labels": row["input_ids"][0] % 2} for row in data()]
    args = arguments(tmp_path, save_strategy="no")
    given = trainer_optimizer(args, optimizer=optimizer)
    trained = Trainer(classifier(kind), args, train_dataset=rows, optimizer_cls_and_kwargs=given)
    with pytest.warns(UserWarning, match=r"nothing is coupled.*has no output embedding.*coupled=\[\]") as caught:
        trained.train()
    assert len([w for w in caught if "coupled" in str(w.message)]) == 1
    assert {group["second_moment"] for group in inner(trained).param_groups} == {"elementwise"}
    before = dict(classifier(kind).named_parameters())
    assert any(p.requires_grad and not torch.equal(p, before[name]) for name, p in trained.model.named_parameters())


def test_parameters_that_no_optimizer_holds_are_told_once(tmp_path) -> None:
    class Resized(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **others) -> None:
            model.resize_token_embeddings(VOCABULARY + 3)

    whole = trainer(tmp_path, ours={}, save_strategy="no")
    whole.add_callback(Resized())
    with pytest.warns(UserWarning, match=r"lm_head.weight \(67, 16\): not in the optimizer.*resize_token") as caught:
        whole.train()
    assert len([w for w in caught if "not in the optimizer" in str(w.message)]) == 1


def test_lora_alone_couples_nothing_and_says_so_once(tmp_path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with pytest.warns(UserWarning, match=r"lm_head.weight\) is frozen.*modules_to_save") as caught:
        trained = trainer(tmp_path, model, ours={})
        trained.train()
    assert len([w for w in caught if "coupled" in str(w.message)]) == 1
    assert [group["second_moment"] for group in inner(trained).param_groups] == ["elementwise"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        OptimizerFactory()(model, coupled=[])


def test_a_head_that_peft_saves_is_coupled_and_resumes(tmp_path) -> None:
    def adapted() -> nn.Module:
        torch.manual_seed(0)
        return get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))

    whole = trainer(tmp_path / "whole", adapted(), ours={})
    whole.train()
    name = "base_model.model.lm_head.modules_to_save.default.weight"
    assert inner(whole).param_groups[0]["param_names"] == [name]
    assert inner(whole).state[whole.model.get_parameter(name)]["exp_avg_sq"].shape == (1, WIDTH)
    killed(trainer(tmp_path / "killed", adapted(), ours={}))
    resumed = trainer(tmp_path / "killed", adapted(), ours={})
    resumed.train(resume_from_checkpoint=True)
    assert_equal(weights(resumed.model), weights(whole.model))


def test_clipping_twice_is_told_once_and_the_start_says_who_clips(tmp_path, caplog) -> None:
    args = arguments(tmp_path)
    with pytest.warns(UserWarning, match=r"Trainer to a norm of 1.0 and by the optimizer to 0.5") as caught:
        trainer_optimizer(args, max_grad_norm=0.5)
    assert len(caught) == 1
    args.max_grad_norm = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer_optimizer(args, max_grad_norm=0.5)
        trainer_optimizer(arguments(tmp_path))
    logger = logging.getLogger("coupled_adam")
    logger.addHandler(caplog.handler)
    trained = trainer(tmp_path, ours={}, save_strategy="no", max_steps=2)
    trained.train()
    logger.removeHandler(caplog.handler)
    told = [record.getMessage() for record in caplog.records if record.name == "coupled_adam"]
    assert told[0] == "CoupledAdam" and not any("\\n" in line for line in told)
    assert "  coupled over the vocabulary: lm_head.weight (64, 16), weight decay 0" in told
    assert told[-1] == "  clipping by the Trainer: to a global norm of 1"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("embeding_lr_factor", "; did you mean 'embedding_lr_factor'?"),
        ("max_gradnorm", "; did you mean 'max_grad_norm'?"),
        ("colour", ""),
    ],
)
def test_a_misspelt_argument_is_named_before_the_model_is_there(name: str, told: str, tmp_path) -> None:
    with pytest.raises(TypeError, match=re.escape(f"unexpected keyword argument {name!r}{told}") + "$"):
        trainer_optimizer(arguments(tmp_path), **{name: 1.0})
    trainer_optimizer(arguments(tmp_path), center=True, coupling_scale=0.5, optimizer=CoupledAdam)


def test_the_factory_takes_the_arguments_that_axolotl_passes(tmp_path) -> None:
    factory, kwargs = trainer_optimizer(arguments(tmp_path))
    model = llama()
    optimizer = factory()(model, arguments(tmp_path), **kwargs)
    assert optimizer.param_groups[0]["params"][0] is model.lm_head.weight
