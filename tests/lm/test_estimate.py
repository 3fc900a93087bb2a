"""How fast the arithmetic is said to be."""

import json
from pathlib import Path

import pytest
import torch

from coupled_adam.lm import train as loop
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.estimate import estimate, flops_per_token, peak_flops, speed
from coupled_adam.lm.model import parameter_count
from coupled_adam.lm.parallel import World
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.sources import TextFiles


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA H100 80GB HBM3", "float32", None),
        ("NVIDIA H100 PCIe", "bfloat16", None),
        ("NVIDIA H200 NVL", "bfloat16", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bfloat16", None),
        ("NVIDIA GB200", "bfloat16", None),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
    ],
)
def test_a_peak_is_that_of_the_very_device_and_precision(
    device: str, precision: str, peak: float | None, tiny: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    experiment = tiny.with_values(train__precision=precision)
    assert peak_flops(experiment, World(device=torch.device("cuda"))) == peak
    assert peak_flops(experiment, World(1, 8, 8, torch.device("cuda"))) == (peak and 8 * peak)
    assert peak_flops(experiment, World()) is None, "a CPU"


def test_speed_in_words() -> None:
    assert speed(405.5e12, 989e12) == "MFU 41.0%"
    assert speed(41.04e9, None) == "41.0 GFLOP/s" and speed(1.23e15, None) == "1,230.0 TFLOP/s"


def test_a_run_says_how_fast_it_is(
    tiny: Experiment, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = prepare(TextFiles(text_file), tiny.data, tmp_path / "corpus")
    model = loop.train(tiny, corpus, tmp_path / "run", lambda model, last: {})
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    # 6 a parameter; attention: 12 · 2 layers · 16 wide · 16 tokens.
    per_token = 6 * parameter_count(model) + 6144
    assert flops_per_token(tiny, parameter_count(model)) == per_token
    assert last["flops_per_second"] == pytest.approx(per_token * last["tokens_per_second"], abs=per_token)  # one token
    assert speed(last["flops_per_second"], None) in capsys.readouterr().err.splitlines()[-1]


def test_what_checkpointing_computes_again_is_arithmetic_but_no_use(tiny: Experiment) -> None:
    again = tiny.with_values(train__activation_checkpointing=True)
    assert estimate(again).flops == pytest.approx(estimate(tiny).flops * 4 / 3)
    assert flops_per_token(again, 100) == flops_per_token(tiny, 100)
