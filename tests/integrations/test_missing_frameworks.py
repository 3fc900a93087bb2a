"""Without its framework every integration is one line that names what to install."""

import json
import pkgutil
import re
import subprocess
import sys

from coupled_adam import integrations

FRAMEWORKS = ["accelerate", "axolotl", "lightning", "olmo_core", "peft", "torchtitan", "transformers", "trl"]

#: What needs no framework.
ALONE = {"announce", "bare_parameters", "health_callbacks"}

CODE = """
import importlib, json, sys
modules, hidden = map(json.loads, sys.argv[1:])
sys.modules.update(dict.fromkeys(hidden))
told = {}
for module in modules:
    try:
        importlib.import_module(f"coupled_adam.integrations.{module}")
    except Exception as error:
        told[module] = f"{type(error).__name__}: {error}"
print(json.dumps(told))
"""


def test_what_is_missing_is_named_in_one_line_by_every_module() -> None:
    modules = [module.name for module in pkgutil.iter_modules(integrations.__path__)]
    arguments = [json.dumps(modules), json.dumps(FRAMEWORKS)]
    result = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert set(told) == set(modules) - ALONE
    line = r"ImportError: [\w, ]+ not installed[:;] .*install .*"
    assert {module: text for module, text in told.items() if not re.fullmatch(line, text)} == {}
