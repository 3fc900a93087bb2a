"""What would be released: built, checked, installed and run without the checkout."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from paragraphs import paragraphs

import coupled_adam

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.long


def done(*command: str | Path, cwd: Path | None = None) -> str:
    """What a program prints that finds nothing on the path but what is installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, cwd=cwd, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel, made from the sdist, and the sdist."""
    out = tmp_path_factory.mktemp("dist")
    done(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    return {"wheel": next(out.glob("*.whl")), "sdist": next(out.glob("*.tar.gz"))}


def test_the_index_takes_them(built: dict[str, Path]) -> None:
    assert done(sys.executable, "-m", "twine", "check", "--strict", *built.values()).count("PASSED") == 2


def test_the_wheel_holds_the_package_alone(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"coupled_adam"}
    assert not [name for name in names if "test" in name.lower()]
    assert {"coupled_adam/py.typed", "coupled_adam/experiments/published.toml"} <= set(names)
    assert f"\nVersion: {coupled_adam.__version__}\n" in metadata
    text = metadata.split("\n\n", 1)[1]
    assert "## Why it works" in text and "--8<--" not in text
    assert [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")] == []


def test_the_sdist_holds_what_its_tests_need(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:  # not where the tests run from an sdist
        hidden = (".github/", ".pre-commit")
        assert [name for name in tracked.stdout.split() if name not in names and not name.startswith(hidden)] == []
    assert {"tests/conftest.py", "docs/index.md", "benchmarks/optimizer_step.py", "NOTICE"} <= names


def test_the_wheel_runs_where_nothing_else_of_us_is(built: dict[str, Path], tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    packages = Path(done(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    done(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages, built["wheel"])
    # What it depends on is borrowed; the package itself comes before it on the path.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    step = (
        "import torch, coupled_adam as c; p = torch.zeros(9, 4, requires_grad=True); p.grad = torch.ones(9, 4);"
        "c.CoupledAdam([{'params': [p], 'second_moment': 'vocabulary'}], lr=0.5).step();"
        "print(p[0, 0].item(), c.__file__)"
    )
    moved, file = done(python, "-c", step, cwd=tmp_path).split()
    assert float(moved) == pytest.approx(-0.5) and Path(file).is_relative_to(packages)
    command = [python, "-m", "coupled_adam"]
    assert done(*command, "--version", cwd=tmp_path).strip() == coupled_adam.__version__
    (tmp_path / "text.txt").write_text(paragraphs(1500), encoding="utf-8")
    printed = done(*command, "demo", "--text", "text.txt", "--steps", "2", "--out", "out", cwd=tmp_path)
    assert "mean shift ratio" in printed and (tmp_path / "out" / "report.html").exists()
