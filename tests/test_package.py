"""What a user gets who installs the package with torch alone."""

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main

from coupled_adam import __version__
from coupled_adam.cli import app

ROOT = Path(__file__).parents[1]
with (ROOT / "pyproject.toml").open("rb") as file:
    EXTRAS = tomllib.load(file)["project"]["optional-dependencies"]

#: Modules of the extras, hidden from an interpreter as if they were not installed.
HIDDEN = [
    *(
        "numpy",
        "numba",
        "scipy",
        "gensim",
        "hyperhyper",
        "tokenizers",
        "transformers",
        "datasets",
        "pydantic",
        "tomli_w",
    ),
    *("filelock", "xxhash", "typer", "rich", "jinja2", "plotly", "lm_eval", "gguf", "safetensors", "tensorboard"),
    *("wandb", "trackio", "lightning", "yaml", "click"),
]
COMMANDS = sorted(typer.main.get_command(app).commands)


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, encoding="utf-8", timeout=120)


def bare(code: str) -> subprocess.CompletedProcess[str]:
    """Python where a warning is an error and the extras are not installed."""
    return python(f"import sys; sys.modules.update(dict.fromkeys({HIDDEN}))\n{code}", "-W", "error")


def bare_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = ["coupled-adam", *arguments]
    return bare(f"sys.argv = {argv}\nfrom coupled_adam.__main__ import main\nmain()")


def test_the_import_is_silent_and_waits_for_torch() -> None:
    result = bare(
        "import coupled_adam as c; print('torch' in sys.modules, c.__version__, set(c.__all__) <= set(dir(c)))"
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == ["False", __version__, "True"]


def test_the_optimizers_need_torch_alone() -> None:
    """Nothing imports DTensors before there is one: that takes as long as torch itself."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({HIDDEN}))\n"
        "from coupled_adam import *; import coupled_adam, torch\n"
        "print('torch.distributed.tensor' in sys.modules)\n"
        "assert all(getattr(coupled_adam, name) is globals()[name] for name in coupled_adam.__all__)\n"
        "p = torch.zeros(9, 4, requires_grad=True); p.grad = torch.ones(9, 4)\n"
        "groups = [{'params': [p], 'second_moment': 'vocabulary'}]\n"
        "[kind(groups, lr=0.5).step() for kind in (CoupledAdam, Adams, Adams_ZeRO)]"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "False"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'coupled_adam' has no attribute 'CoupledAdan'"):
        importlib.import_module("coupled_adam").CoupledAdan  # noqa: B018


@pytest.mark.parametrize(
    ("missing", "module", "extra"),
    [
        ("numpy", "geometry", "geometry"),
        ("scipy", "geometry", "geometry"),
        ("tokenizers", "lm", "demo"),
        ("plotly", "report", "demo"),
        ("jinja2", "audit", "demo"),
        ("transformers", "integrations.transformers", "demo"),
        ("jax", "optax", "jax"),
        ("optax", "optax", "jax"),
    ],
)
def test_a_missing_extra_is_named(missing: str, module: str, extra: str) -> None:
    result = python(f"import sys; sys.modules['{missing}'] = None; import coupled_adam.{module}")
    assert result.stderr.splitlines()[-1] == (
        f"ImportError: {missing} not installed; in a clone of the repository: pip install '.[{extra}]'"
    )


@pytest.mark.parametrize(
    ("module", "package"), [("torchtitan", "torchtitan"), ("olmo_core", "ai2-olmo-core"), ("axolotl", "axolotl")]
)
def test_a_missing_trainer_is_named(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"coupled_adam.integrations.{module}", raising=False)
    with pytest.raises(ImportError, match=f"^{module} not installed: pip install {package}$"):
        importlib.import_module(f"coupled_adam.integrations.{module}")


def test_nothing_names_the_package_index() -> None:
    """The package is on none: a reader of the clone can type ``pip install '.[EXTRA]'``, of an extra that there is."""
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.py"), *ROOT.glob("examples/*.py")]
    written = "\n".join(path.read_text("utf-8") for path in texts)
    assert re.findall(r"pip install [\"']?coupled[-_]adam.*", written) == []
    named = re.findall(r"pip install [^\n`]*?[\"']\.\[([\w,]+)\]", written) + re.findall(r"require\(\"(\w+)\"", written)
    assert {extra for names in named for extra in names.split(",")} <= set(EXTRAS)


def test_the_version_and_the_help_need_nothing() -> None:
    version = bare_command("--version")
    assert (version.returncode, version.stdout, version.stderr) == (0, f"{__version__}\n", "")
    for arguments in ([], ["--help"], ["-h"], ["audit", "--help"]):
        result = bare_command(*arguments)
        assert (result.returncode, result.stderr) == (0, "")
        assert "pip install '.[demo]'" in result.stdout


def test_the_help_without_extras_is_that_with_them() -> None:
    """Command by command, in the same words."""
    lines = {}
    for with_extras in (True, False):
        code = "sys.argv = ['coupled-adam', '--help']\nfrom coupled_adam.__main__ import main\nmain()"
        result = python(f"import sys\n{code}") if with_extras else bare(code)
        commands = result.stdout.split("Commands:\n")[1]
        lines[with_extras] = [line.strip().rstrip(".") for line in commands.splitlines() if line.strip()]
    assert lines[True] == lines[False]
    assert [line.split()[0] for line in lines[False]] == list(typer.main.get_command(app).commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_its_extra_is_one_line(command: str) -> None:
    result = bare_command(command, "x")
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line == "coupled-adam: typer, rich not installed; in a clone of the repository: pip install '.[demo]'"


def test_the_command_line_and_its_help_do_not_wait_for_torch() -> None:
    """Help of a whole second is a help less."""
    code = (
        "import sys; from coupled_adam.cli import app\n"
        f"for arguments in (['--help'], *([command, '--help'] for command in {COMMANDS})):\n"
        "    app(args=arguments, standalone_mode=False)\n"
        "print([m for m in ('torch', 'numpy', 'plotly', 'transformers', 'rich.console') if m in sys.modules])"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
