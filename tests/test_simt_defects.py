"""Mutation test of the emulator: every seeded defect is caught."""

import pytest
from simt.build import build
from simt.defects import DEFECTS, outcomes


@pytest.fixture(scope="module", autouse=True)
def built():
    build(defect.kernel for defect in DEFECTS)


@pytest.mark.parametrize("defect", DEFECTS, ids=str)
def test_defect_is_caught(defect, seed):
    assert any(outcome != "missed" for outcome in outcomes(defect, hooks=True, seed=seed % 2**31))
