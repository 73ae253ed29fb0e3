"""Test reports of this folder (--junitxml) name the version of transformers, which `supported.py` reads."""

import pytest
import transformers


@pytest.fixture(scope="session", autouse=True)
def _name_transformers(record_testsuite_property):
    record_testsuite_property("transformers", transformers.__version__)
