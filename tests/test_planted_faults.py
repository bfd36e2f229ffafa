"""One of the planted faults; `python tests/planted_faults.py` plants them all."""

import os

import emulated
import planted_faults
import pytest


@pytest.mark.parametrize("name", planted_faults.FAULTS)
def test_there_is_where_to_plant_it(name):
    file, text, fault = planted_faults.FAULTS[name]
    assert (emulated.PROJECT / file).read_text().count(text) == 1 and text != fault


@pytest.mark.slow
def test_a_missing_barrier_is_noticed(tmp_path):
    if reason := emulated.unavailable():
        (pytest.fail if os.environ.get("DAT_REQUIRE_EMULATED") == "1" else pytest.skip)(reason)
    library = planted_faults.planted("a barrier is missing", tmp_path)
    assert "RACE" in planted_faults.noticed(library)
