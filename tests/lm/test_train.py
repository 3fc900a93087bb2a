"""The model and the loop: what they compute, and that a run is never lost."""

import contextlib
import itertools
import json
import math
import os
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import as_of_an_older_version
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.nn import functional as F

from coupled_adam.errors import InputError
from coupled_adam.lm import checkpoint, run
from coupled_adam.lm import train as loop
from coupled_adam.lm.batches import Batches
from coupled_adam.lm.checkpoint import latest_checkpoint
from coupled_adam.lm.config import Experiment, Loss, Model, Schedule
from coupled_adam.lm.corpus import Corpus
from coupled_adam.lm.metrics_jsonl import MetricsLog
from coupled_adam.lm.model import LanguageModel, build_model, parameter_count
from coupled_adam.lm.parallel import World
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.run import read_environment, read_experiment
from coupled_adam.lm.schedule import learning_rate as schedule_of
from coupled_adam.lm.sources import TextFiles


@pytest.fixture
def corpus(text_file: Path, tiny: Experiment, tmp_path: Path) -> Corpus:
    return prepare(TextFiles(text_file), tiny.data, tmp_path / "corpus")


def no_figures(model: LanguageModel, last: bool) -> loop.Figures:
    return {}


def test_the_loss_is_the_summed_cross_entropy_of_the_logits() -> None:
    model = build_model(Model(n_layers=2, n_heads=2, hidden_size=16), vocab_size=64, sequence_length=8, seed=0)
    tokens = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(model(inputs, targets).total, expected)
    assert expected.item() / targets.numel() == pytest.approx(math.log(64), rel=0.02), "untrained: all tokens alike"


def test_a_position_does_not_see_later_ones() -> None:
    model = build_model(Model(n_layers=2, n_heads=2, hidden_size=16), vocab_size=64, sequence_length=8, seed=0)
    tokens = torch.randint(64, (1, 8), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % 64
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5], after[:, 5])


def test_the_model_is_gpt2_without_biases() -> None:
    width, layers, vocabulary, sequence = 32, 3, 512, 16
    model = build_model(Model(n_layers=layers, n_heads=4, hidden_size=width), vocabulary, sequence, seed=0)
    per_layer = 12 * width**2 + 2 * width
    assert parameter_count(model) == (vocabulary + sequence) * width + layers * per_layer + width
    assert not any("bias" in name for name, _ in model.named_parameters())
    assert model.head.weight is model.token_embedding.weight
    spread = {name: p.std().item() for name, p in model.named_parameters() if p.ndim == 2}
    assert spread["token_embedding.weight"] == pytest.approx(0.02, rel=0.1)
    assert spread["blocks.0.mlp.proj.weight"] == pytest.approx(0.02 / math.sqrt(6), rel=0.1)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        return build_model(Model(n_layers=1, n_heads=2, hidden_size=8), 64, 8, seed).token_embedding.weight

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
    assert torch.equal(torch.rand(1), expected), "the global random state is left alone"


def test_the_learning_rate_warms_up_from_0_and_falls_to_the_minimum() -> None:
    schedule = Schedule(lr=1e-3, min_lr=1e-4, warmup_steps=10)
    rates = [loop.learning_rate(step, schedule, 110) for step in range(111)]
    assert rates[0] == 0 and rates[5] == pytest.approx(5e-4) and rates[10] == 1e-3
    assert rates[60] == pytest.approx((1e-3 + 1e-4) / 2) and rates[110] == pytest.approx(1e-4)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_training_lowers_the_loss_and_writes_what_it_did(tiny: Experiment, corpus: Corpus, tmp_path: Path) -> None:
    calls = []

    def evaluate(model: LanguageModel, last: bool) -> loop.Figures:
        calls.append(model.token_embedding.weight.detach().clone())
        return {"answer": 42.0}

    loop.train(tiny, corpus, tmp_path / "run", evaluate)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(25))
    assert [line["step"] for line in lines if "answer" in line] == [0, 8, 16, 24]
    assert lines[-1]["tokens"] == 24 * 64
    assert lines[-1]["loss"] < lines[1]["loss"] - 0.1
    assert (tmp_path / "run" / "experiment.toml").read_text() == tiny.to_toml()
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000020", "step-00000024"], "the newest, and the one before"


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_python_and_numpy_compute_as_before(
    fails: bool, before: bool, tiny: Experiment, corpus: Corpus, tmp_path: Path
) -> None:
    def figures(model: LanguageModel, last: bool) -> loop.Figures:
        if fails:
            raise RuntimeError("no figures")
        return {}

    torch.set_flush_denormal(before)
    try:
        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
            loop.train(tiny, corpus, tmp_path / "run", figures)
        assert (sys.float_info.min / 2 == 0) is before
    finally:
        torch.set_flush_denormal(False)


def test_the_rms_of_the_embeddings_step_is_that_of_its_movement(
    tiny: Experiment, corpus: Corpus, tmp_path: Path
) -> None:
    embeddings = []

    def figures(model: LanguageModel, last: bool) -> loop.Figures:
        embeddings.append(model.head.weight.detach().double())
        return {}

    loop.train(tiny.with_values(evaluation__every=1), corpus, tmp_path / "run", figures)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = [(now - before).square().mean().sqrt().item() for before, now in itertools.pairwise(embeddings)]
    assert len(expected) == tiny.train.steps and max(expected) > 1e-4
    assert [line["embedding_step_rms"] for line in lines[1:]] == pytest.approx(expected, rel=1e-3)


def test_milestones_are_kept(tiny: Experiment, corpus: Corpus, tmp_path: Path) -> None:
    experiment = tiny.with_values(train__checkpoint_every=4, train__keep_every=8, train__keep_last=1, train__steps=20)
    loop.train(experiment, corpus, tmp_path / "run", no_figures)
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000008", "step-00000016", "step-00000020"]


@pytest.mark.parametrize("terms", [{}, {"z_loss": 0.01, "mu_loss": 300.0, "softcap": 2.0}])
def test_the_losses_are_those_of_a_textbook_loop(terms: dict, tiny: Experiment, corpus: Corpus, tmp_path: Path) -> None:
    settings = {"optimizer__embedding__name": "adamw", "train__steps": 100, "train__micro_batch": 2}
    settings |= {f"loss__{name}": value for name, value in terms.items()}
    experiment = tiny.with_values(**settings)
    loop.train(experiment, corpus, tmp_path / "run", no_figures)
    lines = MetricsLog(tmp_path / "run" / "metrics.jsonl").read()[1:]

    model = build_model(experiment.model, corpus.vocab_size, 16, seed=3)
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and n != "token_embedding.weight"]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or n == "token_embedding.weight"]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: loop.learning_rate(step, experiment.schedule, 100) / optimizer.defaults["lr"]
    )
    batches = Batches(corpus.shards("train"), 16, 4, seed=3)
    expected, penalties = [], []
    for step in range(100):
        tokens, targets = batches.batch(step)
        logits, penalty = model(tokens).flatten(0, 1), torch.zeros(())
        if terms:
            logits = terms["softcap"] * torch.tanh(logits / terms["softcap"])
            penalty = terms["z_loss"] * logits.logsumexp(1).square().mean()
            penalty = penalty + terms["mu_loss"] * model.token_embedding.weight.mean(0).square().sum()
        loss = torch.nn.functional.cross_entropy(logits, targets.flatten())
        optimizer.zero_grad()
        (loss + penalty).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        expected.append(loss.item())
        penalties.append(penalty.item())
    found = [line["loss"] for line in lines]
    assert found == pytest.approx(expected, abs=1e-4)
    assert found[-1] < found[0] - 0.3
    if terms:
        assert [line["penalty"] for line in lines] == pytest.approx(penalties, rel=1e-3)
    assert bool(terms) == all("penalty" in line for line in lines) == any("penalty" in line for line in lines)


@pytest.mark.parametrize("tied", [True, False])
def test_parts_of_a_batch_and_ranks_have_the_gradient_of_the_batch(tied: bool) -> None:
    penalized = Loss(z_loss=0.1, mu_loss=3000.0, softcap=2.0)
    model = build_model(Model(n_layers=2, n_heads=2, hidden_size=16, tied=tied), 320, 16, 0, penalized).double()
    tokens = torch.randint(300, (4, 17), generator=torch.Generator().manual_seed(0))

    def found(micro: int, *worlds: World) -> list[torch.Tensor]:
        """Cross entropy and penalties, summed over the ranks, and the gradients, averaged over them as DDP does."""
        model.zero_grad()
        parts = [loop.backward(model, (tokens[:, :-1], tokens[:, 1:]), micro, "float32", world) for world in worlds]
        return [torch.stack(parts).sum(0), *(p.grad / len(worlds) for p in model.parameters())]

    whole = found(4, World())
    assert whole[0][1] > 1, "the penalties count"
    for parts in (found(1, World()), found(1, World(0, 2), World(1, 2))):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)


def test_what_centering_changes_is_said_once(
    tiny: Experiment, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = tiny.with_values(optimizer__embedding__center=True)
    with warnings.catch_warnings(record=True) as warned:
        model = loop.train(experiment, corpus, tmp_path / "run", no_figures)
    assert not any("center" in str(warning.message) for warning in warned)
    assert mean_of(model).abs().max() < 1e-8
    said = capsys.readouterr().err
    assert said.count("tiny: optimizer.embedding.center changes what the model predicts: the embeddings are") == 1
    loop.train(experiment, corpus, tmp_path / "run", no_figures)
    loop.train(experiment.with_values(model__tied=False), corpus, tmp_path / "untied", no_figures)
    assert "changes what the model predicts" not in capsys.readouterr().err


def test_a_checkpoint_from_before_a_setting_of_the_optimizer_resumes(
    tiny: Experiment, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def older(*arguments: object) -> tuple:
        model_state, optimizer_state = get_state_dict(*arguments)
        for group in optimizer_state["param_groups"]:
            del group["center"], group["maximize"]
        return model_state, optimizer_state

    def stop(model: LanguageModel, last: bool) -> loop.Figures:
        if (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    experiment = tiny.with_values(optimizer__embedding__center=True)
    whole = loop.train(experiment, corpus, tmp_path / "whole", no_figures)
    with monkeypatch.context() as patch, pytest.raises(loop.Interrupted):
        patch.setattr(checkpoint, "get_state_dict", older)
        loop.train(experiment, corpus, tmp_path / "run", stop)
    resumed = loop.train(experiment, corpus, tmp_path / "run", no_figures)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


class Killed(BaseException):
    """What kill -9 is to a process: nothing is tidied up after it."""


@pytest.mark.parametrize(
    ("cut", "settings"),
    [
        *((cut, {"optimizer__embedding__name": name}) for cut in (1, 10, 13, 24) for name in ("adamw", "coupled_adam")),
        (13, {"train__sampling": "replacement"}),
        (13, {"optimizer__core__name": "muon", "model__qkv": "split"}),
        (13, {"optimizer__core__name": "adams", "model__qkv": "heads"}),
    ],
)
def test_a_run_cut_at_any_step_ends_as_the_undisturbed_one(
    cut: int, settings: dict, tiny: Experiment, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny.with_values(**settings)
    whole = loop.train(experiment, corpus, tmp_path / "whole", no_figures)

    write = MetricsLog.write

    def write_until_cut(self: MetricsLog, line: dict) -> None:
        write(self, line)
        if line["step"] == cut:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MetricsLog, "write", write_until_cut)
        loop.train(experiment, corpus, tmp_path / "cut", no_figures)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')  # half a line, as a killed process leaves it
    (tmp_path / "cut" / "checkpoints" / ".step-00000020.1.tmp").mkdir(parents=True)  # and half a checkpoint
    resumed = loop.train(experiment, corpus, tmp_path / "cut", no_figures)

    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    lines = [MetricsLog(tmp_path / run / "metrics.jsonl").read() for run in ("whole", "cut")]
    same = ("loss", "drift_second_moments", "drift_gradients", "drift_decay")
    assert [[line.get(k) for k in same] for line in lines[0]] == [[line.get(k) for k in same] for line in lines[1]]


def mean_of(model: LanguageModel) -> torch.Tensor:
    return model.head.weight.detach().double().mean(0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embedding", ["adamw", "coupled_adam"])
def test_the_drift_is_summed_over_the_run(
    tied: bool, embedding: str, tiny: Experiment, corpus: Corpus, tmp_path: Path
) -> None:
    experiment = tiny.with_values(optimizer__embedding__name=embedding, model__tied=tied)
    model = loop.train(experiment, corpus, tmp_path / "run", no_figures)
    lines = [line for line in MetricsLog(tmp_path / "run" / "metrics.jsonl").read() if "drift_decay" in line]
    assert [line["step"] for line in lines] == [0, 8, 16, 24]
    assert [lines[0][f"drift_{cause}"] for cause in ("second_moments", "gradients", "decay")] == [0, 0, 0]
    start = mean_of(build_model(experiment.model, corpus.vocab_size, 16, seed=3))
    end = mean_of(model)
    causes = {cause: lines[-1][f"drift_{cause}"] for cause in ("second_moments", "gradients", "decay")}
    assert sum(causes.values()) == pytest.approx(((end - start) @ end / end.norm()).item(), abs=1e-7)
    assert causes["decay"] == 0 and (causes["second_moments"] == 0) == (embedding == "coupled_adam")
    assert (abs(causes["gradients"]) < 1e-7) == (not tied), "an untied head's gradients sum to zero"


def test_the_drift_is_no_figure_where_steps_are_not_known(tiny: Experiment, corpus: Corpus, tmp_path: Path) -> None:
    def drawn(run: str) -> list[int]:
        return [line["step"] for line in MetricsLog(tmp_path / run / "metrics.jsonl").read() if "drift_decay" in line]

    for name in ("sgd", "adams"):
        loop.train(tiny.with_values(optimizer__embedding__name=name), corpus, tmp_path / name, no_figures)
        assert drawn(name) == []
    for name in ("evaluation__drift", "optimizer__embedding__center"):
        loop.train(tiny.with_values(**{name: name.endswith("center")}), corpus, tmp_path / name, no_figures)
        assert drawn(name) == []

    def interrupt(model: LanguageModel, last: bool) -> loop.Figures:
        if MetricsLog(tmp_path / "old" / "metrics.jsonl").read()[-1:] and not drawn("old")[1:]:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(loop.Interrupted):
        loop.train(tiny, corpus, tmp_path / "old", interrupt)
    state = latest_checkpoint(tmp_path / "old" / "checkpoints") / "state.json"
    as_of_an_older_version(state, "drift")
    file = tmp_path / "old" / "experiment.toml"
    file.write_text(file.read_text().replace("drift = true\n", ""))
    as_of_an_older_version(file.with_name("environment.json"), "experiment")
    loop.train(tiny, corpus, tmp_path / "old", no_figures)
    assert drawn("old") == [0, 8], "a checkpoint from before there were sums"


@pytest.mark.parametrize("where", ["step", "save", "rename"])
def test_a_second_signal_ends_at_once_and_the_next_call_goes_on(
    where: str, tiny: Experiment, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    def evaluate(model: LanguageModel, last: bool) -> loop.Figures:
        if where == "step" and MetricsLog(tmp_path / "run" / "metrics.jsonl").read()[7:]:
            interrupt()
        return {}

    def interrupted(*arguments: object, **named: object) -> None:
        interrupt()

    whole = loop.train(tiny, corpus, tmp_path / "whole", no_figures)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if where != "step":
            patch.setattr(checkpoint, where if where == "save" else "swap", interrupted)
        loop.train(tiny, corpus, tmp_path / "run", evaluate)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.rglob("*") if path.name.startswith(".step")] == []
    resumed = loop.train(tiny, corpus, tmp_path / "run", no_figures)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends(number: int, tiny: Experiment, corpus: Corpus, tmp_path: Path) -> None:
    def interrupt(model: LanguageModel, last: bool) -> loop.Figures:
        if (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 8:
            os.kill(os.getpid(), number)
        return {}

    before = signal.getsignal(number)
    with pytest.raises(loop.Interrupted, match="saved at step 8 of 24"):
        loop.train(tiny, corpus, tmp_path / "run", interrupt)
    assert signal.getsignal(number) is before
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").name == "step-00000008"


def test_a_finished_run_is_only_loaded(tiny: Experiment, corpus: Corpus, tmp_path: Path) -> None:
    trained = loop.train(tiny, corpus, tmp_path / "run", no_figures)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()

    def refuse(model: LanguageModel, last: bool) -> loop.Figures:
        raise AssertionError("a finished run is not evaluated again")

    loaded = loop.train(tiny, corpus, tmp_path / "run", refuse)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), loaded.parameters(), strict=True))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics


def lengthened(experiment: Experiment, steps: int, **settings: object) -> Experiment:
    return experiment.with_values(train__steps=steps, **settings)


def straight_through(
    experiment: Experiment, planned: list[int], corpus: Corpus, run: Path, monkeypatch: pytest.MonkeyPatch
) -> LanguageModel:
    """The last length as one run, whose learning rates are those of the parts."""
    with monkeypatch.context() as patch:
        patch.setattr(
            loop,
            "learning_rate_in_parts",
            lambda step, schedule, _: schedule_of(step, schedule, next(n for n in planned if step < n)),
        )
        return loop.train(lengthened(experiment, planned[-1]), corpus, run, no_figures)


#: A run in parts: the lengths, and settings of all of them.
PARTS = {
    "two": ([24, 40], {}),
    "three": ([10, 24, 37], {}),
    "by one": ([24, 25], {}),
    "adamw": ([24, 40], {"optimizer__embedding__name": "adamw"}),
    "drawn": ([24, 40], {"train__sampling": "replacement"}),
    "in the warm-up": ([3, 24], {}),
}


@pytest.mark.parametrize("parts", PARTS)
def test_a_run_in_parts_is_one_run_with_the_learning_rates_of_the_parts(
    parts: str, tiny: Experiment, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, settings = PARTS[parts]
    experiment = tiny.with_values(**settings)
    whole = straight_through(experiment, planned, corpus, tmp_path / "whole", monkeypatch)
    for steps in planned:
        model = loop.train(lengthened(experiment, steps), corpus, tmp_path / "run", no_figures, longer=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    same = ("step", "loss", "lr", "tokens")
    logs = [MetricsLog(tmp_path / run / "metrics.jsonl").read() for run in ("whole", "run")]
    assert [[line.get(k) for k in same] for line in logs[0]] == [[line.get(k) for k in same] for line in logs[1]]
    assert read_environment(tmp_path / "run")["planned_steps"] == planned
    assert read_experiment(tmp_path / "run") == lengthened(experiment, planned[-1])
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert {f"step-{steps:08d}" for steps in planned} <= kept, "what a part ended with is not lost"


@pytest.mark.parametrize("schedule", [{"lr": 1e-3, "min_lr": 1e-3}, {"warmup_steps": 30}, {}])
def test_a_longer_run_says_whether_it_is_the_one_from_the_start(
    schedule: dict, tiny: Experiment, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = tiny.with_values(**{f"schedule__{key}": value for key, value in schedule.items()})
    whole = loop.train(lengthened(experiment, 40), corpus, tmp_path / "whole", no_figures)
    loop.train(experiment, corpus, tmp_path / "run", no_figures)
    capsys.readouterr()
    model = loop.train(lengthened(experiment, 40), corpus, tmp_path / "run", no_figures, longer=True)
    said = capsys.readouterr().err
    assert "finished at step 24, now training to step 40" in said
    same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    assert same == bool(schedule) == ("The learning rates are those of a run of 40 steps" in said)
    assert same != ("The result differs from that of a run of 40 steps from the start" in said)


@pytest.mark.parametrize("when", ["between the records", "step 29", "last checkpoint of the first part"])
def test_a_longer_run_cut_anywhere_ends_as_the_undisturbed_one(
    when: str, tiny: Experiment, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = lengthened(tiny, 40)
    whole = straight_through(tiny, [24, 40], corpus, tmp_path / "whole", monkeypatch)
    loop.train(tiny, corpus, tmp_path / "run", no_figures)
    write = MetricsLog.write

    def killed(*arguments: object) -> None:
        raise Killed

    def killed_at_29(log: MetricsLog, line: dict) -> None:
        write(log, line)
        if line["step"] == 29:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        if when == "between the records":
            patch.setattr(run, "write_text", killed)
        else:
            patch.setattr(MetricsLog, "write", killed_at_29)
        loop.train(longer, corpus, tmp_path / "run", no_figures, longer=True)
    if when == "between the records":
        assert read_experiment(tmp_path / "run") == tiny, "still a finished run"
        loop.train(tiny, corpus, tmp_path / "run", no_figures)
    if when.startswith("last"):
        next((tmp_path / "run" / "checkpoints" / "step-00000024").rglob("*.distcp")).write_bytes(b"damaged")
    model = loop.train(longer, corpus, tmp_path / "run", no_figures, longer=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    assert read_environment(tmp_path / "run")["planned_steps"] == [24, 40]


def test_what_is_no_longer_run_is_refused_and_nothing_changed(tiny: Experiment, corpus: Corpus, tmp_path: Path) -> None:
    def interrupt(model: LanguageModel, last: bool) -> loop.Figures:
        if (tmp_path / "cut" / "metrics.jsonl").read_text().count("\n") == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    loop.train(tiny, corpus, tmp_path / "run", no_figures)
    with pytest.raises(loop.Interrupted):
        loop.train(tiny, corpus, tmp_path / "cut", interrupt)
    refused = {
        r"run contains a run of 24 steps, 24 of them done.*cannot be shortened": ("run", lengthened(tiny, 12), True),
        r"cut contains a run of 24 steps, 8 of them done.*finish it with train\.steps=24": (
            "cut",
            lengthened(tiny, 40),
            True,
        ),
        r"train\.steps: 24 there, 40 requested; train\.batch_tokens": (
            "run",
            lengthened(tiny, 40, train__batch_tokens=128),
            True,
        ),
        r"train\.steps: 24 there, 40 requested": ("run", lengthened(tiny, 40), False),
    }
    for message, (name, experiment, longer) in refused.items():
        files = {path: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        with pytest.raises(InputError, match=message):
            loop.train(experiment, corpus, tmp_path / name, no_figures, longer=longer)
        assert files == {path: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
    loop.train(lengthened(tiny, 40), corpus, tmp_path / "run", no_figures, longer=True)
    with pytest.raises(InputError, match=r"contains a run of 40 steps, 40 of them done.*cannot be shortened"):
        loop.train(tiny, corpus, tmp_path / "run", no_figures, longer=True)
    file = tmp_path / "run" / "experiment.toml"
    file.write_text(file.read_text().replace("steps = 40", "steps = 60"))
    with pytest.raises(InputError, match=r"changed since the run was started \(train\.steps: 40 recorded, 60 now\)"):
        loop.train(lengthened(tiny, 60), corpus, tmp_path / "run", no_figures, longer=True)


def test_another_experiment_or_text_in_the_same_folder_is_refused(
    tiny: Experiment, corpus: Corpus, text_file: Path, tmp_path: Path
) -> None:
    loop.train(tiny, corpus, tmp_path / "run", no_figures)
    with pytest.raises(InputError, match=r"different settings .*train\.steps: 24 there, 30 requested"):
        loop.train(tiny.with_values(train__steps=30), corpus, tmp_path / "run", no_figures)
    text_file.write_text(text_file.read_text().replace("king", "emperor"))
    other = prepare(TextFiles(text_file), tiny.data, tmp_path / "other")
    with pytest.raises(InputError, match="not the text that"):
        loop.train(tiny, other, tmp_path / "run", no_figures)


def test_a_loss_that_is_not_finite_stops_the_run(tiny: Experiment, corpus: Corpus, tmp_path: Path) -> None:
    def poison(model: LanguageModel, last: bool) -> loop.Figures:
        if (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 16:
            with torch.no_grad():
                model.final_norm.weight.fill_(math.nan)
        return {}

    with pytest.raises(loop.DivergedError, match=r"step 17: loss nan.*Lower schedule\.lr"):
        loop.train(tiny, corpus, tmp_path / "run", poison)
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").name == "step-00000010"
