"""Contract 1: the eight laws hold for every mixer of every `tests/*/mixer_cases.py`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("laws", HERE / "laws.py")
laws = importlib.util.module_from_spec(spec)
spec.loader.exec_module(laws)

CASES = list(laws.collect(HERE.parent))


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_law(case, law):
    laws.hold(law, case.factory, case.inputs)


def test_case_names_are_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
