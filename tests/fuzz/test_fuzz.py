"""Random calls of every op: value and gradients, compared with independent formulas in float64.

A failure names its case. `FASTKL_FUZZ=<name> make test ARGS=tests/fuzz/test_fuzz.py` runs it alone;
FASTKL_FUZZ=<number> runs so many times as many.
"""

import os

import pytest

from fuzz_cases import CASES, COMPOSED
from fuzz_check import check
from fuzz_inputs import Draw

ASKED = os.environ.get("FASTKL_FUZZ", "1")
# The interpreter is slow, and what is composed of ops adds little to their own cases.
COUNTS = {"native": 12, "torch": 6, "triton": 2}
COUNTS_COMPOSED = {"native": 5, "torch": 1, "triton": 1}


def names(op: str, way: str) -> list[str]:
    if "/" in ASKED:
        return [ASKED] if ASKED.startswith(f"{op}/{way}/") else []
    count = (COUNTS_COMPOSED if op in COMPOSED else COUNTS)[way]
    return [f"{op}/{way}/{index}" for index in range(int(count * float(ASKED)))]


@pytest.mark.parametrize("way", COUNTS)
@pytest.mark.parametrize("op", CASES)
def test_any_call_gives_what_its_formula_says(op, way):
    failures = []
    for name in names(op, way):
        draw = Draw(name)
        case = CASES[op](draw)
        try:
            check(case, draw, way)
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}\n    {draw.level}: {case}")
    assert not failures, "\n".join([f"{len(failures)} of {len(names(op, way))} failed", *failures[:20]])
