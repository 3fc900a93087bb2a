"""Embedding health in other people's trainers, with the real ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from coupled_adam import monitor
from coupled_adam.integrations.health_callbacks import HealthReport
from coupled_adam.integrations.health_in_transformers import EmbeddingHealth

CHEAP = {"mean_shift_ratio", "norm_of_mean", "principal_share", "inverse_condition"}
DRIFT = {"drift_second_moments", "drift_gradients", "drift_decay"}


def tiny_llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, tie_word_embeddings=tied, **sizes))


class Tokens(Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens = (96 ** torch.rand(8, generator=torch.Generator().manual_seed(i))).long()
        return {"input_ids": tokens, "labels": tokens}


class Listener(TrainerCallback):
    """Stands for W&B and the like, which come before the callbacks of the user."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **others: Any) -> None:
        self.heard.append((state.global_step, dict(logs)))


def trainer(directory: Path, listener: Listener, tied: bool = True, **options: Any) -> Trainer:
    settings = {"max_steps": 8, "save_steps": 5, "logging_steps": 4, "learning_rate": 1e-2, "weight_decay": 0.1}
    settings |= {"per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(directory), **settings)
    made = Trainer(tiny_llama(tied), arguments, train_dataset=Tokens(), callbacks=[listener])
    made.add_callback(EmbeddingHealth(made, **{"every": 3, "isotropy_every": 2} | options))
    return made


def reports(listener: Listener) -> dict[int, dict[str, float]]:
    """What came through the log, by step, without the prefix."""
    kept = []
    for step, logs in listener.heard:
        if figures := {k.removeprefix("embedding/"): x for k, x in logs.items() if k.startswith("embedding/")}:
            kept.append((step, figures))
    assert len(kept) == len(dict(kept)), "no step is reported twice"
    return dict(kept)


def test_the_trainers_log_has_health_and_drift(tmp_path: Path) -> None:
    listener = Listener()
    made = trainer(tmp_path, listener)
    made.train()
    found = reports(listener)
    assert list(found) == [0, 3, 6, 8], "the start, every third step, the end"
    assert [set(figures) for figures in found.values()] == [
        CHEAP | DRIFT | extra for extra in ({"isotropy"}, set(), {"isotropy"}, set())
    ]
    assert {k: found[8][k] for k in CHEAP} == pytest.approx(monitor.health(made.model), rel=1e-6)
    # The Trainer decays the embedding, and its scheduler changes the learning rate after every step.
    start = tiny_llama().lm_head.weight.detach().double().mean(0)
    end = made.model.lm_head.weight.detach().double().mean(0)
    moved = ((end - start) @ end / end.norm()).item()
    assert sum(found[8][cause] for cause in DRIFT) == pytest.approx(moved, abs=1e-7)
    assert found[8]["drift_decay"] < 0 < found[8]["drift_second_moments"]
    assert any("embedding/norm_of_mean" in line for line in made.state.log_history)
    assert not made.optimizer.optimizer._optimizer_step_post_hooks, "nothing is left behind"


def test_a_resumed_trainer_goes_on_from_its_sums(tmp_path: Path) -> None:
    whole, resumed = Listener(), Listener()
    trainer(tmp_path, whole).train()
    again = trainer(tmp_path, resumed)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    found, expected = reports(resumed), reports(whole)
    assert list(found) == [6, 8]
    for step, figures in found.items():
        shared = figures.keys() - {"isotropy"}
        assert {k: figures[k] for k in shared} == {k: expected[step][k] for k in shared}


def test_untied_embeddings_are_both_reported(tmp_path: Path) -> None:
    listener = Listener()
    trainer(tmp_path, listener, tied=False, drift=False, isotropy_every=0).train()
    assert set(reports(listener)[0]) == CHEAP | {f"input_{name}" for name in CHEAP}


def test_an_optimizer_that_does_not_split_is_told_and_health_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    model, report = tiny_llama(), HealthReport()
    report.begin(model, [torch.optim.SGD(model.parameters())])
    assert "not reported: drift does not support SGD" in capsys.readouterr().err
    assert set(report.figures(model, 0)) == {f"embedding/{name}" for name in CHEAP | {"isotropy"}}
    assert report.state_dict() == {}
    with pytest.raises(ValueError, match="does not say what its output embedding is"):
        report.begin(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="every=0"):
        HealthReport(every=0)


def test_lightning_logs_the_same_and_resumes(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from coupled_adam.integrations.health_in_lightning import EmbeddingHealth as Callback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny_llama()

        def training_step(self, batch: dict[str, torch.Tensor], i: int) -> torch.Tensor:
            return self.net(**batch).loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Log(lightning.loggers.logger.DummyLogger):
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[dict[str, float]] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.lines.append(dict(metrics))

    def fit(steps: int, start: str | None = None) -> tuple[Any, Log, Module]:
        log, module = Log(), Module()
        quiet = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing")
        made = lightning.Trainer(
            accelerator="cpu",
            max_steps=steps,
            accumulate_grad_batches=2,
            log_every_n_steps=2,
            logger=log,
            callbacks=[Callback(every=2)],
            default_root_dir=tmp_path,
            **dict.fromkeys(quiet, False),
        )
        made.fit(module, torch.utils.data.DataLoader(Tokens(), batch_size=4), ckpt_path=start)
        return made, log, module

    _, log, module = fit(6)
    lines = [line for line in log.lines if "embedding/norm_of_mean" in line]
    assert len(lines) == 3, "after 2, 4 and 6 steps"
    assert lines[-1]["embedding/norm_of_mean"] == pytest.approx(monitor.health(module)["norm_of_mean"], rel=1e-6)
    start, end = (m.net.lm_head.weight.detach().double().mean(0) for m in (Module(), module))
    moved = ((end - start) @ end / end.norm()).item()
    assert sum(lines[-1][f"embedding/{cause}"] for cause in DRIFT) == pytest.approx(moved, abs=1e-6)
    first, _, _ = fit(4)
    first.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, module = fit(6, str(tmp_path / "half.ckpt"))  # on other batches: this loader begins anew
    (last,) = [line for line in resumed.lines if "embedding/norm_of_mean" in line]
    end = module.net.lm_head.weight.detach().double().mean(0)
    moved = ((end - start) @ end / end.norm()).item()
    assert sum(last[f"embedding/{cause}"] for cause in DRIFT) == pytest.approx(moved, abs=1e-6)
