"""The code in the README and the documentation runs as it stands there, and the API pages are complete."""

import ast
import functools
import re
import socket
import sys
import textwrap
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import coupled_adam

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
API_PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
#: The rooms whose warnings docs/troubleshooting.md quotes.
WARNING = ("optim", "models", "integrations", "monitor")
INDENTED = re.compile(r"(?:^    .*\n(?:\n(?=    ))?)+", re.MULTILINE)


def is_python(text: str) -> bool:
    """Whether it does something, in Python; a name of a command is an expression too."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.Call) for node in nodes)


def blocks(page: Path) -> list[str]:
    """The Python of a page, between fences or indented."""
    indented = [textwrap.dedent(block) for block in INDENTED.findall(FENCED.sub("", page.read_text("utf-8")))]
    return fenced(page) + list(filter(is_python, indented))


def fenced(page: Path) -> list[str]:
    """The Python of an API page: what is indented there are options."""
    return [block for kind, block in FENCED.findall(page.read_text("utf-8")) if kind == "python"]


BLOCKS = [pytest.param(block, id=f"{page.name}-{i}") for page in PAGES for i, block in enumerate(blocks(page))]
BLOCKS += [
    pytest.param(block, id=f"api/{page.name}-{i}", marks=pytest.mark.long)  # whole runs
    for page in API_PAGES
    for i, block in enumerate(fenced(page))
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


def what_a_reader_has(tmp_path: Path) -> dict[str, Any]:
    """A model, data, and a job that runs; everything else a block imports or makes itself."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=120, tie_word_embeddings=False, **sizes))
    model.save_pretrained(tmp_path / "model")
    model.__dict__["head"] = model.get_output_embeddings()  # a name, no second place in the model
    tokens = torch.randint(120, (2, 8))
    batch = {"input_ids": tokens, "labels": tokens}
    optimizer = coupled_adam.CoupledAdam(coupled_adam.param_groups(model))
    model(**batch).loss.backward()
    optimizer.step()
    model.zero_grad()
    checkpoint.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path / "checkpoint")
    return {
        "model": model,
        "optimizer": optimizer,
        "saved": optimizer.state_dict(),
        "batch": batch,
        "batches": [batch],
        "dataset": [{"input_ids": row, "labels": row} for row in tokens],
        "dataloader": DataLoader([batch], batch_size=None),
        "mesh": init_device_mesh("cpu", (1,)),
        "E": torch.randn(120, 16).numpy(),
        "documents": torch.randn(30, 8).numpy(),
        "queries": torch.randn(4, 8).numpy(),
    }


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 20


def test_a_block_is_found_however_it_is_set(tmp_path: Path) -> None:
    fenced = "```python\na = 1\n```\n\n```bash\nd = 2\n```\n"
    indented = "\n    import b\n\n    b.c()\n\nText:\n\n    pip install x\n\nText:\n\n    pytest\n"
    (tmp_path / "page.md").write_text(fenced + indented, encoding="utf-8")
    assert blocks(tmp_path / "page.md") == ["a = 1\n", "import b\n\nb.c()\n"]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_runs(block: str, alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = what_a_reader_has(tmp_path)
    monkeypatch.chdir(tmp_path)  # what a block saves
    block = re.sub(r"^model = \.\.\..*\n", "", block, flags=re.MULTILINE)
    block = re.sub(r'"[\w./-]+\.gguf"', repr(str(tmp_path / "model")), block)
    exec(compile(block, "a block of the documentation", "exec"), given)


@pytest.fixture(scope="module")
def api_pages() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import api_pages

        yield api_pages
    finally:
        sys.path.remove(str(ROOT / "tools"))


def test_every_public_name_stands_in_the_api_pages(api_pages: ModuleType) -> None:
    """``tools/check_docs.py`` looks for them in the pages that are built."""
    assert api_pages.missing_pages() == []
    names = api_pages.public_names(api_pages.package())
    assert len(names) > 100
    assert names["coupled_adam.geometry.plane"] == "coupled_adam.geometry.plane.plane"  # not the module


def test_docstrings_of_the_api_pages_are_complete(api_pages: ModuleType) -> None:
    assert api_pages.faulty_docstrings() == []


def test_types_in_signatures_stand_in_the_api_pages(api_pages: ModuleType) -> None:
    assert api_pages.unlinked_types() == []


def test_tables_of_all_pages_are_whole(api_pages: ModuleType) -> None:
    assert api_pages.faulty_tables() == []


MODULE = '''
"""A package."""

from dataclasses import dataclass

from coupled_adam.unseen import Unseen

__all__ = ["Shift", "shift"]


@dataclass
class Shift:
    """A shift."""

    length: float
    """Its length."""


def shift(matrix: list[float], scale: float = 1.0) -> Shift:
    """Measure a shift.

    | a | b |
    | - | - |
    | 1 | 2 |

    Args:
        matrix: some numbers,
            or none.
        scale: a factor.

    Returns:
        The shift.

    Raises:
        ValueError: no numbers.

    Examples:
        >>> shift([1.0]).length
        1.0
    """
    if not matrix:
        raise ValueError("no numbers")
    return Shift(scale * sum(matrix))
'''
PAGE = "# A page\n\n| a | b |\n| --- | --- |\n| `x|y` | 2 |\n\n::: coupled_adam.shift\n\n::: coupled_adam.Shift\n"

#: Faults of that module and page: a text, what takes its place, and a part of the complaint.
FAULTS = {
    "an unknown parameter": ("        scale: a", "        factor: a", "'factor' does not appear"),
    "a parameter that is missing": ("        scale: a factor.\n", "", "scale is not under Args"),
    "two parameters in one line": ("        scale: a", "        matrix, scale: a", "'matrix, scale' does not appear"),
    "no section of parameters": ("    Args:\n", "    Given:\n", "matrix is not under Args"),
    "a parameter without a colon": ("scale: a factor", "scale a factor", "Failed to get 'name: description'"),
    "a section without a blank line": ("factor.\n\n    Returns", "factor.\n    Returns", "has no section Returns"),
    "a wrong indentation": ("            or none.", "          or none.", "Confusing indentation"),
    "a result that is missing": ("    Returns:\n", "    Gives:\n", "no section Returns"),
    "a result with a colon": ("        The shift.", "        Size: of the shift.", "'Size' is read as a"),
    "an error that is missing": ("        ValueError:", "        KeyError:", "raises ValueError"),
    "no example": ("        >>> shift", "        shift", "no example"),
    "a field without a word": ('    """Its length."""\n', "", "field length has no docstring"),
    "no docstring": ('    """A shift."""\n', "", "Shift: has no docstring"),
    "a short row in a docstring": ("    | 1 | 2 |", "    | 1 |", "2 columns has a row of 1"),
    "a public name without a page": ("::: coupled_adam.Shift\n", "", "coupled_adam.Shift: on none of the API pages"),
    "a public name that is missing": ('"Shift", ', '"Shift", "Slide", ', "no such name"),
    "an object that is missing": ("::: coupled_adam.Shift\n", "::: coupled_adam.Slide\n", "no such object"),
    "a type without a page": ("matrix: list[float]", "matrix: Unseen", "its type coupled_adam.unseen.Unseen"),
    "a type of a field without a page": ("length: float", "length: Unseen", "its type coupled_adam.unseen.Unseen"),
    "a short row": ("| `x|y` | 2 |", "| `x|y` |", "2 columns has a row of 1"),
    "a long row": ("| `x|y` | 2 |", "| x|y | 2 |", "2 columns has a row of 3"),
    "a short line of dashes": ("| --- | --- |", "| --- |", "2 columns has a row of 1"),
    "no line of dashes": ("| --- | --- |\n", "", "without a line of dashes"),
}


@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_a_fault_in_an_api_page_is_found(api_pages: ModuleType, tmp_path: Path, fault: str) -> None:
    text, instead, complaint = FAULTS.get(fault, ("", "", ""))
    source, pages = tmp_path / "src" / "coupled_adam", tmp_path / "docs" / "api"
    source.mkdir(parents=True)
    pages.mkdir(parents=True)
    assert text in MODULE or text in PAGE
    (source / "__init__.py").write_text(MODULE.replace(text, instead) if text else MODULE, encoding="utf-8")
    (source / "unseen.py").write_text('class Unseen:\n    """A type."""\n', encoding="utf-8")
    (pages / "page.md").write_text(PAGE.replace(text, instead) if text else PAGE, encoding="utf-8")
    found = api_pages.complaints(tmp_path)
    assert (found == []) is (fault == "none")
    assert complaint in "\n".join(found)


def test_links_lead_somewhere() -> None:
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / "docs" / "api").glob("*.md")]
    missing = [
        (page.name, target)
        for page in pages
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert missing == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as Python-Markdown makes them."""
    text = page.read_text("utf-8")
    for name, part in re.findall(r'^--8<-- "([\w./]+):(\w+)"$', text, re.MULTILINE):
        whole = (ROOT / name).read_text("utf-8")
        text += whole.partition(f"[start:{part}]")[2].partition(f"[end:{part}]")[0]
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE):
        words = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", words).strip().lower())
        twice = sum(re.fullmatch(rf"{re.escape(slug)}(_\d+)?", known) is not None for known in found)
        found.add(f"{slug}_{twice}" if twice else slug)
    return found


def test_anchors_lead_somewhere() -> None:
    """The strict build of the documentation does not look at them."""
    missing = [
        (page.name, f"{target}#{anchor}")
        for page in PAGES
        for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text("utf-8"))
        if anchor not in anchors(page.parent / target if target else page)
    ]
    assert missing == []


def text_of(node: ast.AST) -> str | None:
    """A text in the source, with a gap for each value that is put in."""
    if isinstance(node, ast.JoinedStr):
        parts = [str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values]
        return " ".join("".join(parts).split())
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return " ".join(node.value.split())
    return None


@functools.cache
def messages() -> tuple[list[str], list[str]]:
    """All texts in the source, and those that optimizers and integrations warn with."""
    found, warned = [], []
    source = Path(coupled_adam.__file__).parent
    for path in sorted(source.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if (text := text_of(node)) is not None:
                found.append(text)
            if isinstance(node, ast.Call) and node.args and path.relative_to(source).parts[0] in WARNING:
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in ("warn", "_warn") and (text := text_of(node.args[0])) is not None:
                    warned.append(text)
    return found, warned


def quotes() -> list[str]:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    return [text for kind, text in FENCED.findall(page) if kind == "output"]


def is_a_message(quote: str, known: list[str]) -> bool:
    """Whether one text of the source has all parts of a quote, between its …, in their order."""
    parts = [re.escape(part.strip()) for part in " ".join(quote.split()).split("…")]
    return any(re.search(".*".join(parts), message) for message in known)


def test_troubleshooting_quotes_what_the_source_says() -> None:
    known, _ = messages()
    assert len(quotes()) >= 50
    assert [quote for quote in quotes() if max(map(len, quote.split("…"))) < 12] == []
    assert [quote for quote in quotes() if not is_a_message(quote, known)] == []


def test_troubleshooting_has_every_warning_of_the_optimizers() -> None:
    _, warned = messages()
    assert len(warned) >= 15
    assert [message for message in warned if not any(is_a_message(quote, [message]) for quote in quotes())] == []


def test_a_quote_must_be_one_message() -> None:
    known = ["\0 has shape \0, not \0; load another", "it was moved"]
    assert is_a_message("… has shape …, not …; load\nanother", known)
    assert not is_a_message("… has the shape …, not …; load another", known)
    assert not is_a_message("… not …; … has shape …", known)
    assert not is_a_message("… load another …, it was moved", known)


def test_an_answer_is_short_and_leads_on() -> None:
    _, *answers = re.split(r"^## ", (ROOT / "docs" / "faq.md").read_text("utf-8"), flags=re.MULTILINE)
    assert len(answers) >= 20
    assert [answer for answer in answers if len(answer.strip().splitlines()) > 8 or "](" not in answer] == []


def test_every_file_of_the_optimizers_stands_in_the_map() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    source = ROOT / "src" / "coupled_adam"
    files = [f"optim/{path.name}" for path in (source / "optim").glob("[!_]*.py")]
    rooms = [path.name for path in source.glob("[!_]*.py")] + [
        f"{path.parent.name}/" for path in source.glob("*/__init__.py")
    ]
    assert [name for name in files + rooms if f"`{name}`" not in text] == []
