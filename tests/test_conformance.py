"""`python -m fastkl.conformance`: fastkl passes all of it, and the cases are right."""

import conformance_oracle
import pytest
import torch

from fastkl.conformance import CASES, LIBRARIES, check
from fastkl.conformance.__main__ import main
from fastkl.integrations import distributions

NAMES = [f"{case.question}, {case.name}" for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_exact_values_are_those_of_mpmath(case):
    assert list(case.exact) == pytest.approx(conformance_oracle.exact(case), rel=1e-14, abs=0)


def test_fastkl_passes_every_case():
    answers = LIBRARIES["fastkl"][1]()
    assert [case for case in CASES if not check(case, answers[case.question]).passed] == []


MISTAKES = {
    "kl, unit mean": lambda mu, logvar: (mu**2 + logvar.exp() - 1 - logvar).sum(1),
    "kl, wide and narrow": lambda mu, logvar: 0.5 * (mu**2 + (0.5 * logvar).exp() - 1 - 0.5 * logvar).sum(1),
    "kl, nearly the prior": lambda mu, logvar: 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1),
    "kl, video": lambda mu, logvar: 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum([1, 2, 3]),
    "kl, nearly the prior, bfloat16": lambda mu, logvar: 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1),
    "mean kl, video": lambda mu, logvar: 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum([1, 2, 3]).mean(),
    "kl of std, a deviation of 1e-30": lambda mu, std: 0.5 * (mu**2 + std**2 - 1 - (std**2).log()).sum(1),
    "mixture, a component of weight 0": lambda z, w, m, s: torch.logsumexp(
        w.clamp(min=1e-7).log() - 0.5 * (z - m[:, 0]) ** 2 - 0.918939, 1
    ),
    "iwae, two samples": lambda log_w: log_w.logsumexp(1),
    "choice, temperature 0": lambda logits, tau: (logits / tau).softmax(-1).max(-1).values,
    "mixture, far from all": lambda z, w, m, s: (w * (-0.5 * (z - m[:, 0]) ** 2).exp() / 2.5066).sum(1).log(),
    "decomposition, three data far apart": lambda z, mu, logvar, size: torch.zeros(3),
    "one dimension, a shift": lambda x, y: (x.sort(0).values - y.sort(0).values).square().mean().sqrt(),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name):
    assert not check(CASES[NAMES.index(name)], MISTAKES[name]).passed


def test_torch_fails_known_cases_and_passes_with_fastkl():
    def failed() -> set[str]:
        answers = LIBRARIES["torch.distributions"][1]()
        found = [check(case, answers[case.question]) for case in CASES if case.question in answers]
        return {each.case.name for each in found if each is not None and not each.passed}

    assert failed() >= {"a component of weight 0", "temperature 0", "nearly the prior, bfloat16"}
    with distributions.enable():
        assert failed() <= {"temperature 0"}


def test_the_command_prints_a_table_and_says_what_it_does_not_know(capsys):
    assert main(["fastkl"]) == 0
    assert f"{len(CASES)} of {len(CASES)} pass" in capsys.readouterr().out
    assert main(["torch.distributions", "--markdown"]) == 1
    assert "| FAIL | mixture: a component of weight 0 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["tensorflow"])
    assert "no such library: tensorflow" in capsys.readouterr().err


def test_a_library_that_cannot_be_imported_leaves_the_others_their_tables(capsys, monkeypatch):
    """Whatever its import raises."""

    def broken():
        raise RuntimeError("built for another torch\nmore lines")

    monkeypatch.setitem(LIBRARIES, "pyro", ("torch", broken))
    for options in ([], ["--markdown"]):
        assert main(["pyro", "fastkl", *options]) == 1
        told = capsys.readouterr()
        assert (
            f"no answers\n\n    RuntimeError: built for another torch\n\n{'### ' if options else ''}fastkl" in told.out
        )
        assert (f"{len(CASES)} of {len(CASES)} pass" in told.out, told.err) == (True, "")


def test_a_bar_in_an_answer_is_no_cell(capsys, monkeypatch):
    def kl(mu, logvar):
        raise TypeError("mu must be float | int")

    monkeypatch.setitem(LIBRARIES, "pyro", ("torch", lambda: {"kl": kl}))
    main(["pyro", "--markdown"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert {line.replace(r"\|", "").count("|") for line in rows} == {6}


def test_each_run_has_the_same_draws():
    """Of 20,000 seeds 4 give two scores that are too close for the temperature."""
    drawn, state = [], torch.get_rng_state()
    for seed in range(2):
        torch.manual_seed(seed)
        case = CASES[NAMES.index("choice, a small temperature, float16")]
        before = torch.get_rng_state()
        check(case, lambda logits, tau: drawn.append(torch.randn(9)) or torch.ones(1))
        assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(state)
    assert torch.equal(*drawn)
