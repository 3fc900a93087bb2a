"""Every number of README and docs that rests on docs/results is what the files there say."""

import csv
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from coupled_adam import experiments
from coupled_adam.report.paired import Interval, PairedDifference

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "report"))
from made_up_study import row, study  # noqa: E402

#: Numbers that rest on no training run of ours that is kept as a table: headings of the first column.
ELSEWHERE = {
    ("docs/evidence.md", "size"),  # published
    ("docs/gpu.md", "step"),  # benchmarks/gpu_counts.py
    ("docs/integrations.md", "framework"),  # versions
}

#: The same in running text.
QUOTED = {
    ("gpu.md", "1.016"),  # bytes per number, by arithmetic
    ("evidence.md", "± 6"),  # from a published table
    ("evidence.md", "±0"),  # what a number of pairs is planned for
}


@pytest.fixture(scope="module")
def evidence() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import evidence

        yield evidence
    finally:
        sys.path.remove(str(ROOT / "tools"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of the pages and results."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.png"))
    return tmp_path


def complaints(evidence: ModuleType, root: Path, check: bool = True) -> list[str]:
    return evidence.update(root, evidence.Results(root / "docs" / "results"), check)


def test_the_pages_are_what_the_files_say(evidence: ModuleType) -> None:
    assert complaints(evidence, ROOT) == []
    marked = {m["name"] for page in evidence.pages(ROOT) for m in evidence.MARKED.finditer(page.read_text("utf-8"))}
    assert len(marked) >= 5


def test_a_number_that_was_edited_is_noticed_and_put_right(evidence: ModuleType, root: Path) -> None:
    before = (root / "README.md").read_text("utf-8")
    (root / "README.md").write_text(before.replace("+0.087 [", "+0.187 ["), "utf-8")
    told = "README.md: door is not what docs/results has; run python tools/evidence.py"
    assert complaints(evidence, root) == [told]
    assert complaints(evidence, root, check=False) == []
    assert (root / "README.md").read_text("utf-8") == before


def test_a_figure_that_changed_in_a_file_is_noticed(evidence: ModuleType, root: Path) -> None:
    path = root / "docs" / "results" / "sweeps.csv"
    lines = path.read_text("utf-8").splitlines()
    (i,) = [i for i, line in enumerate(lines) if line.startswith("mini-drift-coupled-3e-3-s1,")]
    lines[i] = lines[i].replace("6.3", "6.9", 2)
    path.write_text("\n".join(lines) + "\n", "utf-8")
    found = complaints(evidence, root)
    assert {line.split(": ")[1].split(" ")[0] for line in found} == {"drift", "drift-lowest", "core"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<!-- evidence: nothing -->\n\n1\n\n<!-- /evidence -->", "no block nothing; there are "),
        ("<!-- evidence: drift -->\n\n1\n", "1 markers make 0 blocks"),
        ("1\n<!-- /evidence -->\n", "1 markers make 0 blocks"),
        ("<!-- evidence: drift -->\n<!-- evidence: tied -->\n<!-- /evidence -->", "3 markers make 1 blocks"),
        ("<!-- evidence drift -->\n<!-- /evidence -->", "2 markers make 0 blocks"),
        (
            "<!-- evidence: what-tied -->\n\n1\n\n<!-- /evidence -->",
            "what-tied cannot be made yet: study.csv is not there",
        ),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_markers_that_mean_nothing_are_named(
    text: str, told: str, check: bool, evidence: ModuleType, root: Path
) -> None:
    (root / "docs" / "results" / "study.csv").unlink(missing_ok=True)
    for page in evidence.pages(root):
        page.write_text("", "utf-8")
    page = root / "docs" / "evidence.md"
    page.write_text(text, "utf-8")
    (found,) = complaints(evidence, root, check)
    assert found.startswith(f"docs/evidence.md: {told}")
    assert page.read_text("utf-8") == text, "what cannot be made stays"


def test_a_block_within_a_line_stays_there(evidence: ModuleType) -> None:
    results = evidence.Results(ROOT / "docs" / "results")
    inline, problems = evidence.rendered("So <!-- evidence: rounding -->x<!-- /evidence --> it is.", results)
    assert problems == [] and inline.startswith("So <!-- evidence: rounding -->In float32") and "\n" not in inline


def tables(page: Path) -> list[tuple[str, str]]:
    """The heading of the first column of every table with decimals that stands outside of a block, and its text."""
    text = re.sub(r"<!-- evidence: .*?<!-- /evidence -->", "", page.read_text("utf-8"), flags=re.DOTALL)
    found = re.findall(r"^(?:\|.*\n){2,}", text + "\n", re.MULTILINE)
    return [
        (table.split("|")[1].strip(), table)
        for table in found
        if len(re.findall(r"\|\s*\**[-+−]?\d+\.\d\d+\b", table)) >= 4
    ]


def test_no_table_of_measured_figures_stands_outside_of_a_block() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    unmarked = {(page.relative_to(ROOT).as_posix(), heading) for page in pages for heading, _ in tables(page)}
    assert unmarked - ELSEWHERE == set()


def prose(page: str) -> str:
    """The text of a page without its blocks, code and links."""
    for hidden in (r"<!-- evidence: .*?<!-- /evidence -->", r"^```.*?^```", r"^    .*?$", r"`[^`\n]*`", r"\]\([^)]*\)"):
        page = re.sub(hidden, "", page, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"arXiv[ :]\d{4}\.\d+", "", page)


#: A loss, a share or a spread as runs give them: three decimals, or an interval.
MEASURED = re.compile(r"(?<![\d.])\d+\.\d{3}(?![\d.])|± ?\d|\[[-+−]\d\S*, [-+−]\d\S*\]")


def test_no_measured_figure_stands_in_the_text_outside_of_a_block() -> None:
    pages = {ROOT / "README.md", *(ROOT / "docs").glob("*.md")}
    found = set()
    for page in pages:
        text = "\n".join(line for line in prose(page.read_text("utf-8")).splitlines() if not line.startswith("|"))
        found |= {(page.name, match[0]) for match in MEASURED.finditer(text)}
    assert found - QUOTED == set()


def test_such_a_figure_would_be_found() -> None:
    block = "<!-- evidence: x -->1.234<!-- /evidence -->"
    assert MEASURED.findall(prose("a loss of 3.277")) == ["3.277"]
    assert MEASURED.findall(prose("6.2 ± 0.1, and -0.031 [-0.059, -0.002]")) == ["± 0", "0.031", "[-0.059, -0.002]"]
    assert MEASURED.findall(prose(f"1.85M, arXiv 2502.084, `lr=0.001`, torch 2.13.0, {block}")) == []


def test_the_families_and_their_runs_are_those_of_the_package() -> None:
    page = (ROOT / "docs" / "training.md").read_text("utf-8")
    table = page.split("| family | what is compared | runs |\n")[1].split("\n\n")[0]
    told = {}
    for line in table.splitlines()[1:]:
        names, _, runs = (cell.strip() for cell in line.strip("|").split(" | "))
        every = runs.split(", ")
        families = re.findall(r"`([\w-]+)`", names)
        told |= dict(zip(families, every if len(every) > 1 else every * len(families), strict=True))
    known = experiments.families("mini")
    assert set(told) == set(known)
    for name, family in known.items():
        if "tuned" not in family:
            assert int(told[name]) == len(family["experiments"]) * len(family["seeds"]), name


def test_such_a_table_would_be_found(tmp_path: Path) -> None:
    cells = ("6.12", "**6.13**", "-0.01", "6.1 ± 0.2", "6.15")
    table = "| method | loss |\n| --- | ---: |\n" + "".join(f"| a | {value} |\n" for value in cells)
    (tmp_path / "page.md").write_text(
        f"Text\n\n{table}\n<!-- evidence: x -->\n\n{table}\n<!-- /evidence -->\n", "utf-8"
    )
    assert [heading for heading, _ in tables(tmp_path / "page.md")] == ["method"]


def write(path: Path, rows: list) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for each in rows for key in each)))
        writer.writeheader()
        writer.writerows(rows)


def whole_study() -> list:
    """A study with runs of every grid."""
    rows = [dict(each) for each in study()]
    rows += [dict(row("untied", arm, 1.0, seed)) for arm in ("adamw", "coupled") for seed in (2, 3)]

    def also(name: str, arms: dict[str, str], **values: str | float) -> None:
        for each in study():
            experiment = str(each["experiment"])
            if experiment.startswith("mini-what-tied-") and (arm := arms.get(experiment.split("-")[3])):
                made = name.format(arm=arm, factor=f"x{each['lr_factor']:g}")
                rows.append({**each, "experiment": made, "name": f"{made}-s{each['seed']}", **values})

    for tying in ("tied", "untied"):
        also(f"mini-what-{tying}-{{arm}}-{{factor}}", {"adamw": "adamw-center", "coupled": "coupled-center"})
        also(f"mini-what-{tying}-{{arm}}-{{factor}}", {"token": "element-zero-sum"})
    both = {"adamw": "element", "coupled": "hidden", "token": "factored-0.5"}
    for cell, batch, beta2 in (("b1k", 1024, 0.95), ("beta2-0.99", 1024, 0.99), ("b16k", 16_384, 0.95)):
        also(f"mini-{cell}-{{arm}}-{{factor}}", both, batch_tokens=batch, beta2=beta2, bits_per_byte=1.5)
    plain = {"adamw": "adamw", "coupled": "coupled"}
    for rate in (1e-3, 1e-2):
        also(f"mini-rest-{rate:.0e}-{{arm}}-{{factor}}".replace("e-0", "e-"), plain, lr=rate)
    also("mini-large-1e-2-{arm}-{factor}", both, lr=1e-2)
    also("mini-steps-1952-{arm}-{factor}", plain | {"token": "factored-0.5"}, steps=1952)
    also("mini-steps-b4k-976-{arm}-{factor}", plain | {"token": "factored-0.5"}, steps=976, batch_tokens=4096)
    also("mini-masked-{arm}-{factor}", plain | {"token": "factored-0.5"}, steps=976, batch_tokens=4096)
    also("mini-longer-masked-{arm}-{factor}", plain, steps=1952, batch_tokens=4096)
    for matrices in ("split", "fused"):
        also(f"mini-muon-{matrices}-{{arm}}-{{factor}}", plain)
    also("mini-rates-{arm}-{factor}", plain)
    also("mini-words-{arm}-{factor}", plain)
    also("mini-warm-{arm}-{factor}", plain)
    for name in ("mini-M-300A", "mini-M-300V", "mini-M-300A-untied", "mini-M-300V-untied"):
        drift = {"mu norm": 0.5, "drift_second_moments": 0.3, "drift_gradients": 0.1}
        rows.append({**row("tied", "adamw", 1.0, 1), "experiment": name, "name": f"{name}-s1", **drift})
    for i, each in enumerate(rows):
        each |= {f"log_ratio_{name}": 0.1 for name in ("below_0.1", "0.1_to_1", "1_to_10", "above_10")}
        each["ratio norm"] = 0.02 + 0.01 * (i % 7)
        each["eb_cos_sim"] += 0.1 * (i % 5)
    return rows


def test_every_block_is_made_from_a_whole_study(evidence: ModuleType, root: Path) -> None:
    write(root / "docs" / "results" / "study.csv", whole_study())
    results = evidence.Results(root / "docs" / "results")
    made = {name: block(results) for name, block in evidence.BLOCKS.items()}
    for name, text in made.items():
        assert text and not re.search(r"\b(nan|inf|None)\b", text), name
        if text.startswith("|"):
            widths = {line.replace("\\|", "").count("|") for line in text.splitlines()}
            assert len(widths) == 1 and len(text.splitlines()) >= 3, name
    assert "| Coupled Adam | 10 | 10 | 5.821 | +0.101 [+0.100, +0.102] | " in made["what-tied"]
    assert [line.split(" | ")[0] for line in made["batch"].splitlines()[2:]] == ["| b1k", "| beta2-0.99", "| b16k"]
    for name, per_cell in (("batch-tempered", 1), ("batch-embeddings", 3)):
        cells = [line.split(" | ")[0] for line in made[name].splitlines()[2:]]
        assert cells == [cell for cell in ("| b1k", "| beta2-0.99", "| b16k") for _ in range(per_cell)], name
    assert re.fullmatch(
        r"0.\d{3} \S+ \S+ at 1,024 .* and 0.\d{3} \S+ \S+ at 16,384 tokens per batch", made["batch-sentence"]
    )
    assert "| 16384 | 8192 | 0.95 |" in made["batch"] and "| 1024 | 8192 | 0.99 |" in made["batch"]
    assert [line.split(" | ")[0] for line in made["rest"].splitlines()[2:]] == ["| 0.001", "| 0.003", "| 0.01"]
    assert [line.split(" | ")[0] for line in made["large-batch"].splitlines()[2:]] == ["| 0.003", "| 0.01"]
    assert " × 16,384 | best for each | 5.720 | 5.821 |" in made["door"]
    assert [line.split(" | ")[0].split("; ")[1] for line in made["steps"].splitlines()[2:]].count("1,952 × 1,024") == 1
    assert [line.split(" | ")[:3] for line in made["noise"].splitlines()[2:]] == [
        ["| tied", "best for each", "3"],  # at factor 1 there is one pair, and no spread
        ["| untied", "1", "3"],
        ["| untied", "best for each", "3"],
    ]
    assert [line.split(" | ")[:2] for line in made["masked"].splitlines()[2:]] == [
        ["| 976 × 4,096", "AdamW"],
        ["| 976 × 4,096", "Coupled Adam"],
        ["| 976 × 4,096", "tempered, α = 0.5"],
        ["| 1,952 × 4,096", "AdamW"],
        ["| 1,952 × 4,096", "Coupled Adam"],
    ]
    assert "| Coupled Adam, untied | 0.5000 | 0.3000 (60.0%) | 0.1000 (20.0%) | 0.1000 |" in made["health"]
    assert made["headline"].count("best for each") == 7 and "1.85M parameters, 4M tokens" in made["headline"]
    assert made["centering"].count("\n") == 1 + 4 and "the step sums to zero | AdamW" in made["contrasts-tied"]
    assert made["word-similarity-rate"].count("**") == 2 * 2, "one factor chosen an arm"


def test_the_front_holds_what_nothing_is_better_than(evidence: ModuleType, root: Path) -> None:
    write(root / "docs" / "results" / "study.csv", list(study()))
    text = evidence.BLOCKS["front"](evidence.Results(root / "docs" / "results"))
    tied = [line.strip("| ").split(" | ") for line in text.splitlines()[2:] if line.startswith("| tied")]
    losses, isotropies = [float(line[3]) for line in tied], [float(line[4]) for line in tied if "isotropy" in line[-1]]
    assert losses == sorted(losses) and isotropies == sorted(isotropies)
    assert tied[0][1:3] == ["AdamW", "30"] and tied[0][-1] == "isotropy and word similarity", "the lowest loss of all"
    assert ["Coupled Adam", "1"] in [line[1:3] for line in tied], "the most isotropic"


def test_blocks_make_do_with_columns_that_are_missing(evidence: ModuleType, root: Path) -> None:
    rows = whole_study()
    (root / "docs" / "results" / "study-documents.csv").unlink()
    for column in sorted({key for each in rows for key in each} - {"name", "experiment", "seed", "lr_factor", "lr"}):
        write(root / "docs" / "results" / "study.csv", [{k: v for k, v in e.items() if k != column} for e in rows])
        results = evidence.Results(root / "docs" / "results")
        for name, block in evidence.BLOCKS.items():
            try:
                assert "nan" not in block(results), (column, name)
            except evidence.NotYet as reason:
                assert column in (
                    "loss_selection",
                    "loss_report",
                    "step_rms",
                    "ratio norm",
                    "isotropy",
                    "eb_cos_sim",
                    "mu norm",
                    *("kappa_rows", "kappa_text", "batch_tokens", "vocab_size"),
                ), (
                    column,
                    name,
                    reason,
                )


def test_pictures_are_made_of_what_there_is(evidence: ModuleType, root: Path) -> None:
    (root / "docs" / "results" / "study.csv").unlink(missing_ok=True)
    assert evidence.pictures(evidence.Results(root / "docs" / "results")) == {}
    write(root / "docs" / "results" / "study.csv", whole_study())
    found = evidence.pictures(evidence.Results(root / "docs" / "results"))
    assert {name: len(charts) for name, charts in found.items()} == {
        "batch.png": 3,
        "rates.png": 2,
        "front.png": 4,
    }


def test_the_table_of_the_demo_is_what_the_files_say(evidence: ModuleType, root: Path) -> None:
    assert evidence.update_demo(ROOT, evidence.Results(ROOT / "docs" / "results"), check=True) == []
    results, file = evidence.Results(root / "docs" / "results"), root / "src/coupled_adam/report/study.json"
    told = ["src/coupled_adam/report/study.json is not what docs/results has; run python tools/evidence.py"]
    file.parent.mkdir(parents=True)
    assert evidence.update_demo(root, results, check=True) == told and not file.exists()
    assert evidence.update_demo(root, results, check=False) == []
    written = file.read_text("utf-8")
    assert written == (ROOT / "src/coupled_adam/report/study.json").read_text("utf-8")
    file.write_text(written.replace("parameters, tied", "parameters", 1), "utf-8")
    assert evidence.update_demo(root, results, check=True) == told
    (root / "docs" / "results" / "study.csv").unlink()
    (problem,) = evidence.update_demo(root, evidence.Results(root / "docs" / "results"), check=False)
    assert problem == "src/coupled_adam/report/study.json cannot be made yet: study.csv has no tuned runs"


def test_the_table_of_the_demo_takes_the_rows_of_any_study(evidence: ModuleType, root: Path) -> None:
    write(root / "docs" / "results" / "study.csv", whole_study())
    results = evidence.Results(root / "docs" / "results")
    made = json.loads(evidence.evidence_demo.study_json(results))
    block = [line.strip("| ").split(" | ") for line in evidence.BLOCKS["headline"](results).splitlines()]
    assert [made["headings"], *made["rows"]] == [block[0], *block[2:]]
    assert re.fullmatch(
        r"In our study the loss .*, is 0\.\d{3} .* at one .*, and 0\.\d{3} .* for each\.", made["sentence"]
    )


@pytest.mark.parametrize(
    ("intervals", "told"),
    [
        ([(0.1, 0.3), (0.4, 0.6)], "0.200 to 0.500 higher"),
        ([(-0.6, -0.4), (-0.3, -0.1)], "0.200 to 0.500 lower"),
        ([(0.1, 0.3)], "0.200 higher"),
        ([(0.1, 0.3), (-0.1, 0.4)], "0.150 to 0.200 higher (not significant in 1 of 2)"),
        ([(-0.3, -0.1), (0.1, 0.3)], "from 0.200 lower to 0.200 higher"),
        ([None, (0.1, 0.3)], "0.200 to 0.500 higher (not significant in 1 of 2)"),
    ],
)
def test_differences_in_words(intervals: list[tuple[float, float] | None], told: str, evidence: ModuleType) -> None:
    differences = [
        PairedDifference(1, 0.5, None, None, None)
        if each is None
        else PairedDifference(3, sum(each) / 2, 0.1, Interval(*each), 0.01)
        for each in intervals
    ]
    assert evidence.evidence_demo.compared(differences) == told
