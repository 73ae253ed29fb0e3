"""Every benchmark can still be started: nothing else calls most of them."""

import importlib
from pathlib import Path

import pytest

import benchmarks

FOLDER = Path(benchmarks.__file__).parent


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__"))
def test_imports(name):
    importlib.import_module(f"benchmarks.{name}")
