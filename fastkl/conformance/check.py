"""Compare a library's answer with the exact one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastkl.conformance.cases import Case


class Outcome(NamedTuple):
    case: Case
    passed: bool
    answer: str  # the answer, in words or as a number


def in_words(error: Exception) -> str:
    """One line, short enough for a table."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:100]


def check(case: Case, function: Callable[..., Any]) -> Outcome | None:
    """Whether `function` answers the case with the right shape and within its tolerance. None if it returns
    NotImplemented, because it does not support such inputs. Its draws are the same in each run."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            found = function(*case.arguments())
        if found is NotImplemented:
            return None
        found = torch.as_tensor(found).double()
    except Exception as error:  # any error of another library means no answer
        return Outcome(case, False, in_words(error))
    exact = case.values()
    if found.shape != exact.shape:
        return Outcome(case, False, f"{list(found.shape)} in place of {list(exact.shape)}")
    difference = (found - exact).abs()
    passed = bool((difference <= case.tolerance * exact.abs().clamp(min=1e-6)).all())
    worst = int(difference.nan_to_num(torch.inf).flatten().argmax())
    return Outcome(case, passed, f"{found.flatten()[worst].item():.6g}")
