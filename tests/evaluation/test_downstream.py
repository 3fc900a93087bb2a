"""lm-eval's tasks on small local files, with a tiny model."""

import functools
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from torch.nn import functional as F

from coupled_adam import progress
from coupled_adam.errors import InputError
from coupled_adam.evaluation import downstream as module
from coupled_adam.evaluation.downstream import (
    OLDER_VERSIONS,
    PAPER_TASKS,
    PAPER_TASKS_043,
    downstream,
    mean_accuracy,
)
from coupled_adam.evaluation.results import read_results
from coupled_adam.evaluation.tasks.lm_eval_043 import race_prompt, truthfulqa_accuracy

Docs = list[dict[str, Any]]

WORDS = ["river", "lake", "mountain", "sun", "moon", "king", "queen", "dog", "cat", "walked", "saw", "slowly", "over"]
LM_EVAL_TASKS = Path(lm_eval.__file__).parent / "tasks"
FILES = {
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "winogrande": ("winogrande/default.yaml", "validation"),
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "arc_challenge": ("arc/arc_challenge.yaml", "test"),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2.yaml", "validation"),
    "lambada_openai": ("lambada/lambada_openai.yaml", "test"),
    "race": ("race/race.yaml", "test"),
}
SAMPLES = 8


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def problem(rng: random.Random, question: str) -> dict[str, Any]:
    return {"question": question, "answer": rng.choice("ABCD"), "options": [words(rng, 2) for _ in range(4)]}


def documents(task: str) -> Docs:
    """So many documents in the schema of the task's dataset."""
    rng = random.Random(task)

    def one(i: int) -> dict[str, Any]:
        match task:
            case "hellaswag":
                start = {"activity_label": words(rng, 1), "ctx_a": words(rng, 6) + ".", "ctx_b": words(rng, 2)}
                return start | {"endings": [words(rng, 5) for _ in range(4)], "label": str(rng.randrange(4))}
            case "winogrande":
                sentence = f"{words(rng, 4)} _ {words(rng, 3)}"
                options = {"option1": words(rng, 1), "option2": words(rng, 1)}
                return {"sentence": sentence, "answer": rng.choice("12")} | options
            case "arc_easy" | "arc_challenge":
                choices = {"text": [words(rng, 1) for _ in range(4)], "label": list("ABCD")}
                return {"question": words(rng, 5), "choices": choices, "answerKey": rng.choice("ABCD")}
            case "truthfulqa_mc2":
                labels = [1, 1, 0, 0] if i % 2 else [1, 0, 1, 0]
                answers = {"choices": [words(rng, 3) for _ in range(4)], "labels": labels}
                return {"question": words(rng, 5), "mc1_targets": answers, "mc2_targets": answers}
            case "lambada_openai":
                return {"text": words(rng, 8)}
            case "race":
                problems = [problem(rng, words(rng, 3) + "  _  ."), problem(rng, words(rng, 3) + "?")]
                return {"article": words(rng, 12), "problems": repr([*problems, problem(rng, words(rng, 3))])}
        raise AssertionError(task)

    return [one(i) for i in range(SAMPLES)]


def write_task(directory: Path, task: str) -> None:
    """A definition that takes lm-eval's own and reads a local file instead of a dataset of the hub."""
    file, split = FILES[task]
    data = directory / f"{task}.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in documents(task)), encoding="utf-8")
    lines = [f"include: {LM_EVAL_TASKS / file}", f"task: {task}", "dataset_path: json", "dataset_name: null"]
    lines += [f"{name}_split: {split if name == split else 'null'}" for name in ("training", "validation", "test")]
    lines += [f"dataset_kwargs: {{data_files: {{{split}: {data}}}}}"]
    (directory / f"{task}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        # A model of this size gains nothing from a second thread, and waits for it where others compute.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of one layer with random weights, large enough to have opinions."""
    path = tmp_path_factory.mktemp("model")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([words(random.Random(i), 20) for i in range(50)], 300, special_tokens=["<|endoftext|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(path)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=1024, n_embd=16, n_layer=1, n_head=2, initializer_range=0.4
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def local_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    for task in PAPER_TASKS:
        write_task(directory, task)
    return directory


@pytest.fixture(scope="module")
def all_nine(model_dir: Path, local_tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The file and the result of a run of all definitions."""
    out = tmp_path_factory.mktemp("all") / "evaluation" / "downstream.json"
    names = [*PAPER_TASKS, *OLDER_VERSIONS.values()]
    return out, downstream(model_dir, out, digest="d", tasks=names, include_path=local_tasks)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tasks that are really run."""
    names, evaluate = [], module._evaluate

    def spy(lm: Any, task: Any, limit: int | None) -> dict[str, Any]:
        names.append(task.config.task)
        return evaluate(lm, task, limit)

    monkeypatch.setattr(module, "_evaluate", spy)
    return names


@pytest.fixture
def run(model_dir: Path, local_tasks: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A run of local tasks into a file of its own."""

    def call(*tasks: str, digest: str = "d", include_path: Path = local_tasks, **kwargs: Any) -> dict[str, Any]:
        out = tmp_path / "downstream.json"
        result = downstream(model_dir, out, digest=digest, tasks=tasks, include_path=include_path, **kwargs)
        assert read_results(out, "downstream") == result, "what is returned is what is written"
        return result

    return call


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)


@functools.cache
def loaded(model_dir: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    return transformers.AutoTokenizer.from_pretrained(model_dir), model.eval()


def log_likelihood(model_dir: Path, prompt: str, continuation: str) -> tuple[float, bool]:
    """Log-probability of a continuation, and whether the model would have gone on so: without lm-eval."""
    tokenizer, model = loaded(model_dir)
    start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + continuation, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        predicted = F.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)[start - 1 :]
    expected = ids[0, start:]
    greedy = bool((predicted.argmax(-1) == expected).all())
    return float(predicted.gather(1, expected[:, None]).sum()), greedy


def test_all_tasks_of_the_paper_run_in_both_versions(all_nine: tuple[Path, Any]) -> None:
    out, result = all_nine
    assert read_results(out, "downstream") == result
    assert not result["failed"]
    assert list(result["tasks"]) == [*PAPER_TASKS, "truthfulqa_mc2_043", "race_043"]
    for name, task in result["tasks"].items():
        assert (task["n"], task["num_fewshot"], task["limit"]) == (SAMPLES, 0, None), name
        assert 0 <= task["acc"] <= 1 and task["acc_stderr"] >= 0, name
        assert task["harness"] == f"lm-eval {lm_eval.__version__}"
    versions = {name: task["version"] for name, task in result["tasks"].items()}
    assert (versions["truthfulqa_mc2"], versions["truthfulqa_mc2_043"]) == (3.0, 2.0)
    assert (versions["race"], versions["race_043"]) == (3.0, 2.0)
    assert result["tasks"]["lambada_openai"]["metrics"]["perplexity"] > 1
    assert set(result["tasks"]["hellaswag"]["metrics"]) == {"acc_norm", "acc_norm_stderr"}
    assert not result["complete"], "nine tasks are not the seven of the paper"


def test_multiple_choice_agrees_with_the_model_itself(all_nine: tuple[Path, Any], model_dir: Path) -> None:
    hits = []
    for doc in documents("arc_easy"):
        prompt, choices = f"Question: {doc['question']}\nAnswer:", doc["choices"]["text"]
        scores = [log_likelihood(model_dir, prompt, f" {choice}")[0] for choice in choices]
        hits.append("ABCD"[scores.index(max(scores))] == doc["answerKey"])
    accuracy = sum(hits) / len(hits)
    assert 0 < accuracy < 1, "the documents tell right from wrong"
    task = all_nine[1]["tasks"]["arc_easy"]
    assert task["acc"] == pytest.approx(accuracy)
    assert task["acc_stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / (len(hits) - 1)))


def test_lambada_agrees_with_the_model_itself(all_nine: tuple[Path, Any], model_dir: Path) -> None:
    last_words = [doc["text"].rpartition(" ") for doc in documents("lambada_openai")]
    scores = [log_likelihood(model_dir, start, " " + word) for start, _, word in last_words]
    task = all_nine[1]["tasks"]["lambada_openai"]
    assert task["acc"] == pytest.approx(sum(greedy for _, greedy in scores) / SAMPLES)
    assert task["metrics"]["perplexity"] == pytest.approx(math.exp(-sum(s for s, _ in scores) / SAMPLES), rel=1e-4)


def test_truthfulqa_agrees_with_the_model_itself_in_both_versions(all_nine: tuple[Path, Any], model_dir: Path) -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=[LM_EVAL_TASKS / "truthfulqa"], include_defaults=False)
    template = manager.task_index["truthfulqa_mc2"].cfg["doc_to_text"]
    current, older = [], []
    for doc in documents("truthfulqa_mc2"):
        prompt = lm_eval.utils.apply_template(template, doc)
        answers = doc["mc2_targets"]
        p = [math.exp(log_likelihood(model_dir, prompt, f" {choice}")[0]) for choice in answers["choices"]]
        current.append(sum(x for x, label in zip(p, answers["labels"], strict=True) if label) / sum(p))
        older.append(sum(p[: answers["labels"].index(0)]) / sum(p))
    tasks = all_nine[1]["tasks"]
    assert tasks["truthfulqa_mc2"]["acc"] == pytest.approx(sum(current) / SAMPLES, rel=1e-4)
    assert tasks["truthfulqa_mc2_043"]["acc"] == pytest.approx(sum(older) / SAMPLES, rel=1e-4)
    assert sum(current) > 1.05 * sum(older)


def test_the_figures_are_those_of_simple_evaluate(
    all_nine: tuple[Path, Any], model_dir: Path, local_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # facts of the machine, slow to collect
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model_dir)},
        tasks=list(PAPER_TASKS),
        task_manager=TaskManager(include_path=local_tasks, include_defaults=False),
        batch_size=16,
        device="cpu",
        bootstrap_iters=10,
        log_samples=False,
    )
    for name in PAPER_TASKS:
        ours = all_nine[1]["tasks"][name]
        for figure in ("acc", "acc_stderr"):
            assert ours[figure] == pytest.approx(theirs["results"][name][f"{figure},none"], rel=1e-5), (name, figure)


def test_race_differs_in_the_blanks_alone() -> None:
    from lm_eval.tasks.race.preprocess_race import doc_to_text as current

    blank = {"question": "I have  _  .", "answer": "B", "options": ["cat", "dog", "cow", "sun"]}
    asked = {"question": "Who?", "answer": "A", "options": ["a", "b", "c", "d"]}
    last = {"question": "The end is  _  .", "answer": "A", "options": ["a", "b", "c", "d"]}
    doc = {"article": "Text.", "problems": repr([blank, asked, last])}
    assert race_prompt(doc) == "Article: Text.\n\n _  .dog\nQuestion: Who?\nAnswer: a\nThe end is  _  ."
    assert current(doc) == "Article: Text.\n\nI have dog\nQuestion: Who?\nAnswer: a\nThe end is  _  ."
    doc = {"article": "Text.", "problems": repr([asked, asked, last])}
    assert race_prompt(doc) == current(doc)


def test_truthfulqa_differs_where_a_true_answer_follows_a_false_one() -> None:
    from lm_eval.tasks.truthfulqa.utils import process_results_mc2 as current

    results = [(math.log(p), False) for p in (0.1, 0.2, 0.3, 0.2)]
    doc = {"mc2_targets": {"labels": [1, 0, 1, 0]}}
    assert truthfulqa_accuracy(doc, results)["acc"] == pytest.approx(1 / 8)
    assert current(doc, results)["acc"] == pytest.approx(4 / 8)
    doc = {"mc2_targets": {"labels": [1, 1, 0, 0]}}
    assert truthfulqa_accuracy(doc, results)["acc"] == pytest.approx(3 / 8)
    assert current(doc, results)["acc"] == pytest.approx(3 / 8)


def test_the_mean_and_its_standard_error() -> None:
    def figures(acc: float | None, stderr: float | None) -> dict[str, Any]:
        return {"acc": acc, "acc_stderr": stderr}

    mean = mean_accuracy({"a": figures(0.2, 0.03), "b": figures(0.6, 0.04), "c": figures(None, None)})
    assert mean["acc"] == pytest.approx(0.4)
    assert mean["acc_stderr"] == pytest.approx(0.025)
    assert (mean["n_tasks"], mean["mean_over"], mean["complete"]) == (2, ["a", "b"], False)
    assert mean_accuracy({"a": figures(0.2, 0.03), "b": figures(0.6, None)})["acc_stderr"] is None
    assert mean_accuracy({})["acc"] is None
    for seven in (PAPER_TASKS, PAPER_TASKS_043):
        assert mean_accuracy(dict.fromkeys(seven, figures(0.5, 0.1)))["complete"]
        assert not mean_accuracy(dict.fromkeys(seven[1:], figures(0.5, 0.1)))["complete"]
    twice = (*PAPER_TASKS[1:], "race_043")
    assert not mean_accuracy(dict.fromkeys(twice, figures(0.5, 0.1)))["complete"], "one is missing, one is double"


def test_a_second_call_runs_nothing(run: Callable[..., Any], ran: list[str], request: pytest.FixtureRequest) -> None:
    first = run("arc_easy", "race_043")
    assert ran == ["arc_easy", "race_043"]
    request.getfixturevalue("no_model")
    assert run("arc_easy", "race_043") == first
    assert list(run("race_043", "arc_easy")["tasks"]) == ["race_043", "arc_easy"]
    assert ran == ["arc_easy", "race_043"]


#: Tasks whose requests are of another kind each, over the file of lambada_openai; and how many a sample makes.
KINDS = {
    "choices": ("arc_easy", "", 4),
    "rolling": (
        "lambada_openai",
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: word_perplexity}]\n",
        1,
    ),
    "generated": (
        "lambada_openai",
        "output_type: generate_until\ngeneration_kwargs: {until: [' '], max_gen_toks: 2}\n"
        "metric_list: [{metric: exact_match}]\n",
        1,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_shows_its_share_and_the_time_left(
    kind: str, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", -1.0)
    monkeypatch.setattr(progress, "SETTLED", 0.0)
    base, lines, each = KINDS[kind]
    write_task(tmp_path, base)
    with (tmp_path / f"{base}.yaml").open("a", encoding="utf-8") as file:
        file.write(lines)
    found = run(base, include_path=tmp_path)
    assert not found["failed"], found["failed"]
    said, total = capsys.readouterr().err.splitlines(), SAMPLES * each
    told = [re.fullmatch(rf"{base}: request (\d+) of {total} \(\d+%\)(, about .+ left)?", line) for line in said]
    assert [int(match[1]) for match in told if match] == list(range(1, total + 1))
    assert [match[2] is not None for match in told if match] == [True] * (total - 1) + [False]
    assert said[0] == f"[1/1] {base}" and len(said) == total + 2


def test_the_model_is_loaded_once(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, load = [], module._load
    monkeypatch.setattr(module, "_load", lambda *args: loaded.append(args) or load(*args))
    run("arc_easy", "lambada_openai", "winogrande", limit=2)
    assert len(loaded) == 1


def test_another_limit_runs_again_and_the_first_is_kept(run: Callable[..., Any], ran: list[str]) -> None:
    whole = run("arc_easy")
    limited = run("arc_easy", limit=3)
    assert (whole["tasks"]["arc_easy"]["n"], limited["tasks"]["arc_easy"]["n"]) == (SAMPLES, 3)
    assert limited["settings"]["limit"] == 3
    assert limited["earlier"] == [whole["tasks"]["arc_easy"]]
    again = run("arc_easy")
    assert again["tasks"] == whole["tasks"] and again["acc"] == whole["acc"]
    assert ran == ["arc_easy", "arc_easy"]


def test_an_added_task_runs_alone(run: Callable[..., Any], ran: list[str]) -> None:
    run("arc_easy")
    both = run("arc_easy", "winogrande")
    assert ran == ["arc_easy", "winogrande"]
    assert both["mean_over"] == ["arc_easy", "winogrande"]
    one = run("winogrande")
    assert one["mean_over"] == ["winogrande"] and one["acc"] == both["tasks"]["winogrande"]["acc"]


def test_other_weights_run_again_and_forget_the_first(run: Callable[..., Any], ran: list[str]) -> None:
    run("arc_easy")
    other = run("arc_easy", digest="e")
    assert ran == ["arc_easy", "arc_easy"]
    assert other["earlier"] == []


@pytest.mark.parametrize("change", ["data", "definition"])
def test_a_changed_local_task_runs_again(change: str, run: Callable[..., Any], ran: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "tasks"
    directory.mkdir()
    for task in ("race", "arc_easy"):
        write_task(directory, task)
    names = ("race", "race_043", "arc_easy")
    run(*names, include_path=directory)
    if change == "data":
        with (directory / "race.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(documents("race")[0]) + "\n")
    else:
        with (directory / "race.yaml").open("a", encoding="utf-8") as file:
            file.write("target_delimiter: ': '\n")
    ran.clear()
    again = run(*names, include_path=directory)
    assert ran == ["race", "race_043"], "the older version reads the same data"
    assert again["tasks"]["race_043"]["n"] == SAMPLES + (change == "data")


def test_what_ran_before_an_interruption_is_kept(
    run: Callable[..., Any], ran: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evaluate = module._evaluate

    def interrupted(lm: Any, task: Any, limit: int | None) -> dict[str, Any]:
        if task.config.task == "winogrande":
            raise KeyboardInterrupt
        return evaluate(lm, task, limit)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_evaluate", interrupted)
        run("arc_easy", "winogrande", "race")
    kept = json.loads((tmp_path / "downstream.json").read_text(encoding="utf-8"))
    assert list(kept["tasks"]) == kept["mean_over"] == ["arc_easy"]
    run("arc_easy", "winogrande", "race")
    assert ran == ["arc_easy", "winogrande", "race"]


def test_one_sample_has_no_standard_error(run: Callable[..., Any]) -> None:
    result = run("arc_easy", "winogrande", limit=1)
    assert result["tasks"]["arc_easy"]["acc_stderr"] is None
    assert result["acc"] is not None and result["acc_stderr"] is None


def test_missing_data_says_how_to_get_it_and_the_rest_runs(
    run: Callable[..., Any], ran: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "tasks"
    directory.mkdir()
    for task in ("arc_easy", "race"):
        write_task(directory, task)
    (directory / "race.jsonl").unlink()
    result = run("winogrande", "race", "arc_easy", include_path=directory)
    assert list(result["tasks"]) == result["mean_over"] == ran == ["arc_easy"]
    assert not result["complete"]
    assert set(result["failed"]) == {"winogrande", "race"}
    reason = result["failed"]["winogrande"]
    assert "\n" not in reason
    for part in ("load_dataset('allenai/winogrande', 'winogrande_xl')", "HF_HOME", "--include-path"):
        assert part in reason
    assert str(directory / "race.jsonl") in result["failed"]["race"]
    assert "Hub" not in result["failed"]["race"], "a local file is not to be had from the Hub"
    captured = capsys.readouterr()
    assert captured.out == ""
    told = [line.partition(":")[0] for line in captured.err.splitlines()]
    assert told == ["[1/3] winogrande", "winogrande", "[2/3] race", "race", "[3/3] arc_easy", "arc_easy"]
    assert run("winogrande", "race", "arc_easy", include_path=directory) == result, "what failed is tried again"


def test_an_unreachable_hub_is_tried_once(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offline = []

    def unreachable(*args: Any, **kwargs: Any) -> None:
        offline.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    (tmp_path / "empty").mkdir()
    result = run("winogrande", "race", include_path=tmp_path / "empty")
    assert set(result["failed"]) == {"winogrande", "race"}
    assert result["acc"] is None and result["n_tasks"] == 0
    assert offline == [False, True]
    assert datasets.config.HF_HUB_OFFLINE is False


def test_bad_input_is_refused(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_model: None
) -> None:
    manager = lm_eval.tasks.TaskManager
    # The search through all tasks of lm-eval takes 15 seconds.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, **_: manager(None, include_path, False))
    with pytest.raises(InputError, match="helaswag: no such task; the nearest names are hellaswag"):
        run("helaswag")
    with pytest.raises(InputError, match="lambada: a group of tasks"):
        run("lambada")
    with pytest.raises(InputError, match="limit 0"):
        run("arc_easy", limit=0)
    with pytest.raises(InputError, match="not a directory of task definitions"):
        run("arc_easy", include_path=tmp_path / "none")
    assert not (tmp_path / "downstream.json").exists()


def test_a_local_definition_that_cannot_be_read_is_not_passed_over(run: Callable[..., Any], tmp_path: Path) -> None:
    directory = tmp_path / "tasks"
    directory.mkdir()
    (directory / "mine.yaml").write_text("include: nowhere.yaml\ntask: arc_easy\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"mine\.yaml: cannot be read as the definition of arc_easy"):
        run("arc_easy", include_path=directory)


def test_a_directory_without_a_model_is_refused(local_tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a Hugging Face model directory"):
        downstream(tmp_path, tmp_path / "o.json", digest="d", tasks=["arc_easy"], include_path=local_tasks)


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"lm_eval not installed; .*: pip install '\.\[eval\]'"):
        downstream(tmp_path, tmp_path / "o.json", digest="d")


@pytest.mark.parametrize("text", ["{", "{}", "[1]"])
def test_a_file_of_something_else_is_left_alone(text: str, run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "downstream.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"downstream\.json: not a result of this evaluation"):
        run("arc_easy")
    assert (tmp_path / "downstream.json").read_text(encoding="utf-8") == text
