"""The audit through the command line: files, models and runs, in words, as JSON and as a page in a real browser."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import opened, readable
from paragraphs import paragraphs
from playwright.sync_api import Browser
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from coupled_adam import geometry
from coupled_adam.cli import app
from coupled_adam.errors import InputError
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.run import open_run
from coupled_adam.lm.sources import TextFiles
from coupled_adam.lm.train import train

SHIFTED = 0.1 * np.random.default_rng(0).normal(size=(200, 8)) + 2


def audit(*arguments: object) -> list[dict]:
    result = CliRunner().invoke(app, ["audit", *map(str, arguments), "--json"])
    assert result.exception is None, result.exception
    return json.loads(result.stdout)


@pytest.fixture
def arrays(tmp_path: Path) -> list[Path]:
    """A shifted cloud and a centered one."""
    paths = [tmp_path / "shifted.npy", tmp_path / "centered.npy"]
    for path, matrix in zip(paths, (SHIFTED, SHIFTED - SHIFTED.mean(0)), strict=True):
        np.save(path, matrix)
    return paths


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=120, tie_word_embeddings=False, **sizes))
    with torch.no_grad():
        model.lm_head.weight += 0.1
    model.save_pretrained(tmp_path / "untied")
    return tmp_path / "untied"


def test_models_stand_side_by_side(arrays: list[Path]) -> None:
    shifted, centered = audit(*arrays)
    assert (shifted["model"], shifted["matrix"], centered["model"]) == (
        "shifted.npy",
        "embedding",
        "centered.npy",
    )
    assert shifted["figures"]["mean_shift_ratio"] == pytest.approx(geometry.mean_shift_ratio(SHIFTED), rel=1e-5)
    assert centered["figures"]["mean_shift_ratio"] == pytest.approx(0, abs=1e-6)
    assert [f["level"] for f in shifted["findings"]][:2] == ["poor", "poor"]


def test_the_summary_comes_first_the_ranges_once_and_the_advice_last(arrays: list[Path], tmp_path: Path) -> None:
    shifted, centered = audit(*arrays)
    page = tmp_path / "audit.html"
    lines = CliRunner().invoke(app, ["audit", *map(str, arrays), "--html", str(page)]).stdout.splitlines()
    assert lines[0] == f"shifted.npy: {shifted['summary']}"
    assert lines[1] == f"centered.npy: {centered['summary']}"
    row = next(line for line in lines[2:] if "mean shift ratio" in line)
    assert row.split()[-2:] == [f"{shifted['figures']['mean_shift_ratio']:.3f}", "0.000"]
    assert sum("the paper reports 0.73" in line for line in lines) == 1
    assert lines[-5:-3] == [f"Page: {page}", "What to do"]
    assert [line.strip() for line in lines[-3:-1]] == [
        f"{name}: {found['advice']['text']}" for name, found in (("shifted.npy", shifted), ("centered.npy", centered))
    ]
    assert lines[-1].strip() == ("More: docs/audit.md, “What to do after an audit”: “Retrieval”, “Nothing to correct”")


def test_input_and_output_are_told_apart_and_the_output_can_be_centered(untied: Path, tmp_path: Path) -> None:
    before = audit(untied)
    assert [m["matrix"] for m in before] == ["input", "output"]
    after = audit(untied, "--center", tmp_path / "copy")
    assert after == before, "of what was given, not of the copy"
    inner, outer = audit(tmp_path / "copy")
    assert inner["figures"] == before[0]["figures"]
    assert outer["figures"]["mean_shift_ratio"] < 1e-6 < 0.5 < before[1]["figures"]["mean_shift_ratio"]
    models = [LlamaForCausalLM.from_pretrained(path) for path in (untied, tmp_path / "copy")]
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        scores = [model(tokens).logits.log_softmax(-1) for model in models]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-5)


def test_a_run_is_measured_with_its_own_frequencies(tiny: Experiment, text_file: Path, tmp_path: Path) -> None:
    corpus = prepare(TextFiles(text_file), tiny.data, tmp_path / "corpus")
    train(tiny, corpus, tmp_path / "run", lambda model, last: {})
    (found,) = audit(tmp_path / "run")
    embedding = open_run(tmp_path / "run").model().get_output_embeddings().weight
    expected = geometry.norm_frequency_correlation(embedding, corpus.unigram_counts)
    assert found["figures"]["norm_frequency_spearman"] == pytest.approx(expected.spearman)
    assert found["matrix"] == "tied"
    refused = CliRunner().invoke(app, ["audit", str(tmp_path / "run"), "--center", str(tmp_path / "copy")])
    assert isinstance(refused.exception, InputError) and not (tmp_path / "copy").exists()


def test_the_page(arrays: list[Path], browser: Browser, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["audit", *map(str, arrays), "--html", str(tmp_path / "audit.html")])
    assert result.exit_code == 0
    page = opened(browser, tmp_path / "audit.html")
    assert page.problems == []
    assert page.locator(".verdict li").count() == 5, "of the shifted one also whether centering helps"
    assert page.locator("#figures tbody tr").filter(has_text="mean shift").locator("td").count() == 2
    dots = page.locator(".js-plotly-plot").evaluate_all("c => c.map(x => x.querySelectorAll('.point').length)")
    assert dots == [202, 202, 0], "the tokens, the origin and the mean, twice, and the spectrum's lines"
    assert page.locator("main h2").all_inner_texts() == ["Verdict", "Metrics", "Charts", "What to do"]
    assert page.locator(".summary li").count() == page.locator(".advice li").count() == 2
    assert page.locator("main").inner_text().count("the paper reports 0.73") == 1
    for scheme in ("light", "dark"):
        readable(page, scheme)
    page.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (np.full((3, 2), np.nan), "6 values that are NaN"),
        (np.zeros(3), "shape"),
    ],
)
def test_bad_models_are_one_line(content: np.ndarray | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        np.save(tmp_path / "bad.npy", content)
    result = CliRunner().invoke(app, ["audit", str(tmp_path / "bad.npy")])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception) and "\n" not in str(result.exception)


def test_models_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / name / "out.npy" for name in ("a", "b")]
    for i, path in enumerate(paths):
        path.parent.mkdir()
        np.save(path, SHIFTED * (i + 1))
    assert [m["model"] for m in audit(*paths, paths[0])] == list(map(str, paths))


def test_a_tensor_that_is_no_embedding_is_measured_without_words(tiny: Experiment, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(paragraphs(200))
    tiny = tiny.with_values(train__steps=2, schedule__warmup_steps=0)
    train(tiny, prepare(TextFiles(text), tiny.data, tmp_path / "corpus"), tmp_path / "run", lambda m, last: {})
    (found,) = audit(tmp_path / "run", "--tensor", "position_embedding.weight")
    assert found["figures"]["tokens"] == 16 and found["word_similarity"] == {}


def test_one_model_at_a_time_is_centered(arrays: list[Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["audit", *map(str, arrays), "--center", str(tmp_path / "copy.npy")])
    assert "takes one model at a time, not 2" in str(result.exception)


def test_words_are_looked_up_in_a_model_that_was_exported(tiny: Experiment, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(paragraphs(200))
    tiny = tiny.with_values(data__vocab_size=600, train__steps=2, schedule__warmup_steps=0)
    corpus = prepare(TextFiles(text), tiny.data, tmp_path / "corpus")
    train(tiny, corpus, tmp_path / "run", lambda m, last: {})
    assert CliRunner().invoke(app, ["export", str(tmp_path / "run")]).exit_code == 0
    (benchmarks := tmp_path / "benchmarks").mkdir()
    words = ["river", "lake", "mountain", "sun", "moon", "king", "queen", "dog", "cat", "house", "street"]
    (benchmarks / "rw.txt").write_text(
        "".join(f"{w}\t{v}\t{i}\n" for i, (w, v) in enumerate(zip(words, words[::-1], strict=True)))
    )
    of_the_run, of_the_export = audit(tmp_path / "run", tmp_path / "run" / "model", "--benchmarks", benchmarks)
    assert of_the_run["figures"]["word_similarity_pairs"] == 11
    assert of_the_export["word_similarity"] == of_the_run["word_similarity"]


def test_what_a_file_of_numbers_does_not_need_is_not_loaded(arrays: list[Path]) -> None:
    """Each of these takes as long to import as a matrix takes to measure."""
    slow = {"gensim", "hyperhyper", "plotly", "scipy.stats", "torch.distributed.tensor", "transformers"}
    code = (
        "import sys\nfrom coupled_adam.__main__ import main\n"
        f"sys.argv = ['coupled-adam', 'audit', {str(arrays[0])!r}]\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print('loaded:', *{slow} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert "mean shift ratio" in result.stdout and result.stdout.splitlines()[-1] == "loaded:"
