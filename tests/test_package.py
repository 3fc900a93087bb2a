"""What a user gets who installs the package with torch alone."""

import importlib
import subprocess
import sys
from unittest import mock

import pytest

HEAVY = [
    "numba",
    "scipy",
    "gensim",
    "hyperhyper",
    "tokenizers",
    "pydantic",
    "typer",
    "rich",
    "plotly",
    "jinja2",
    "transformers",
    "lm_eval",
    "gguf",
    "tensorboard",
    "wandb",
    "trackio",
]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_the_optimizers_need_torch_alone() -> None:
    blocked = f"import sys; sys.modules.update(dict.fromkeys({HEAVY}))"
    result = python(f"{blocked}; import coupled_adam as c; print(c.__all__)")
    assert result.returncode == 0, result.stderr
    exported = [
        "Adams",
        "Adams_ZeRO",
        "CoupledAdam",
        "__version__",
        "center_",
        "describe",
        "name_checkpoint",
        "param_groups",
    ]
    assert result.stdout.strip() == str(exported)


@pytest.mark.parametrize(
    ("missing", "module", "extra"),
    [
        ("scipy", "geometry", "geometry"),
        ("tokenizers", "lm", "lm"),
        ("plotly", "report", "lm"),
        ("transformers", "integrations.transformers", "lm"),
    ],
)
def test_a_missing_extra_is_named(missing: str, module: str, extra: str) -> None:
    result = python(f"import sys; sys.modules['{missing}'] = None; import coupled_adam.{module}")
    assert result.stderr.splitlines()[-1] == (
        f"ImportError: {missing} not installed: pip install 'coupled-adam[{extra}]'"
    )


@pytest.mark.parametrize(
    ("module", "package"), [("torchtitan", "torchtitan"), ("olmo_core", "ai2-olmo-core"), ("axolotl", "axolotl")]
)
def test_a_missing_trainer_is_named(module: str, package: str) -> None:
    with (
        mock.patch.dict(sys.modules, {module: None}),
        pytest.raises(ImportError, match=f"^{module} not installed: pip install {package}$"),
    ):
        importlib.import_module(f"coupled_adam.integrations.{module}")


def test_the_command_line_without_its_extra_is_one_line() -> None:
    result = python("import sys; sys.modules['typer'] = None; from coupled_adam.__main__ import main; main()")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("coupled-adam: ") and line.endswith("pip install 'coupled-adam[lm]'")
