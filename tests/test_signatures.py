"""The public functions share names, order and defaults of their common arguments."""

import inspect

import pytest

import fastkl
from fastkl import reference

OPS = [name for name in fastkl.__all__ if inspect.isfunction(getattr(fastkl, name))]
# Data come first, then the parameters of a distribution, then those of the prior.
ORDER = [
    "x z y kl log_w",
    "mu mean logits means logvar logvars scale_tril",
    "prior_mu prior_logvar prior_scale_tril",
]


def parameters(function):
    return inspect.signature(function).parameters


@pytest.mark.parametrize("op", OPS)
def test_data_come_before_parameters_and_those_before_the_prior(op):
    groups = {name: number for number, names in enumerate(ORDER) for name in names.split()}
    given = parameters(getattr(fastkl, op))
    found = [groups[name] for name in given if name in groups]
    if "means" in given:  # those of the mixture that is the prior
        return
    assert found == sorted(found)
    positional = [n for n, p in given.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional[0] in groups


@pytest.mark.parametrize("op", OPS)
def test_event_ndim_is_not_given_by_default(op):
    given = parameters(getattr(fastkl, op))
    if "event_ndim" in given:
        assert given["event_ndim"].default is None
        assert given["event_ndim"].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters(getattr(reference, op))["event_ndim"].default is None


@pytest.mark.parametrize("op", [op for op in OPS if inspect.isfunction(getattr(reference, op, None))])
def test_the_definition_takes_the_tensors_in_the_ops_own_order(op):
    tensors = {name for names in ORDER for name in names.split()}
    own, definition = ([n for n in parameters(getattr(of, op)) if n in tensors] for of in (fastkl, reference))
    assert own == definition


@pytest.mark.parametrize("op", OPS)
def test_scale_says_what_a_log_variance_is(op):
    for name, scale in (("logvar", "scale"), ("logvars", "scale"), ("prior_logvar", "prior_scale")):
        of_components = name == "logvars" and "mu" in parameters(getattr(fastkl, op))  # the prior's, of kl_gmm
        scale = "prior_scale" if of_components else scale
        for of in (fastkl, reference) if name != "logvars" and "gmm" not in op else (fastkl,):
            given = parameters(getattr(of, op)) if hasattr(of, op) else {}
            assert name not in given or given[scale].default == "logvar"
