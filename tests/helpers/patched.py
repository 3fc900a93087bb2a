"""A copy of an installed package with one of our patches for it, and programs that import the copy."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

PATCHES = Path(__file__).parents[2] / "examples" / "upstream"


def patched(package: str, directory: Path) -> Path:
    """Copy a package as it is installed into ``directory``, and apply its patch there."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    shutil.copytree(
        spec.submodule_search_locations[0], directory / package, ignore=shutil.ignore_patterns("__pycache__")
    )
    subprocess.run(["git", "apply", PATCHES / f"{package}.patch"], cwd=directory, check=True)
    return directory


def output_of(code: str, directory: Path) -> str:
    """What a program prints for which the packages of ``directory`` come first."""
    paths = os.pathsep.join([str(directory), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
