"""The code in the README and the documentation runs as it stands there."""

import ast
import functools
import re
import socket
import sys
import textwrap
import unicodedata
from collections.abc import Iterator
from pathlib import Path
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
from coupled_adam import geometry, monitor

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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
    text = page.read_text("utf-8")
    indented = [textwrap.dedent(block) for block in INDENTED.findall(FENCED.sub("", text))]
    return [block for kind, block in FENCED.findall(text) if kind == "python"] + list(filter(is_python, indented))


BLOCKS = [pytest.param(block, id=f"{page.name}-{i}") for page in PAGES for i, block in enumerate(blocks(page))]


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


def documented() -> set[str]:
    """What the API pages ask for: objects, and members of them."""
    names = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for name, options in re.findall(r"^::: (\S+)\n((?:    .*\n)*)", page.read_text("utf-8") + "\n", re.MULTILINE):
            members = re.search(r"members: \[([^\]]*)\]", options)
            names |= {name, *(f"{name}.{member.strip()}" for member in (members[1].split(",") if members else []))}
    return names


@pytest.mark.parametrize("package", [coupled_adam, geometry, monitor], ids=lambda package: package.__name__)
def test_every_public_name_stands_in_the_api_pages(package: Any) -> None:
    """``tools/check_docs.py`` looks for them in the pages that are built."""
    asked_for, missing = documented(), []
    for name in set(package.__all__) - {"__version__"}:
        value, path = getattr(package, name), f"{package.__name__}.{name}"
        # A name that a submodule has too stands for the submodule there: the page must ask for the function in it.
        of_module = path in sys.modules or f"coupled_adam.optim.{name}" in sys.modules
        found = {f"{value.__module__}.{value.__qualname__}"} | (set() if of_module else {path, package.__name__})
        if not asked_for & found:
            missing.append(name)
    assert missing == []


PUBLIC = {name.split(".")[-1] for name in documented()} | {*geometry.__all__, *monitor.__all__}


def arguments_without_a_parameter(path: Path) -> list[str]:
    """What docstrings of a file describe as arguments that the function, or the class's constructor, does not take."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            continue
        section = re.search(r"^Args:\n((?:(?:    .*)?\n)+)", f"{ast.get_docstring(node)}\n", re.MULTILINE)
        of_class = [f for f in getattr(node, "body", []) if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
        function = node if isinstance(node, ast.FunctionDef) else next(iter(of_class), None)
        if section is None or function is None:
            continue
        taken = {arg.arg for arg in ast.walk(function.args) if isinstance(arg, ast.arg)}
        named = re.findall(r"^    (\S[^:]*):", section[1], re.MULTILINE)
        if node.name not in PUBLIC:  # several may share a line where no page makes a table of them
            named = [name for names in named for name in names.split(", ")]
        found += [f"{path.name}, {node.name}: {name}" for name in named if name.lstrip("*") not in taken]
    return found


def test_a_docstring_describes_the_arguments_there_are() -> None:
    """On the API pages one by one: they make a table of them."""
    source = Path(coupled_adam.__file__).parent
    assert [line for path in sorted(source.rglob("*.py")) for line in arguments_without_a_parameter(path)] == []


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
