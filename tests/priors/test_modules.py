"""Modules of fastkl under what torch and others do to modules: copied, saved, moved, averaged, called with other
parameters, stacked, parametrised, frozen, shared."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastkl
from fastkl import objectives, priors

from prior_helpers import MAKE, D, K

MODULES = {
    **MAKE,
    "per position": lambda: priors.PerPosition(priors.GaussianMixture(K, D), 1),
    "discriminator": lambda: objectives.Discriminator(D),
}


class Model(nn.Module):
    """A prior's KL and density, or a discriminator's output, with the encoder of a VampPrior as a part of the model."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.encoder = getattr(inner, "encoder", None)

    def forward(self, z):
        if not isinstance(self.inner, priors.Prior):
            return self.inner(z)
        return self.inner.log_prob(z) + 2 * self.inner.kl(fastkl.DiagonalNormal(z, 0 * z), seed=1)


def make(name):
    torch.manual_seed(0)
    model = Model(MODULES[name]())
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    return model


def moved(model, by=0.5):
    """A copy with other parameters."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += by
    return other


def written_and_read(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def z(dtype=torch.float32):
    return torch.randn(5, D, generator=torch.Generator().manual_seed(1)).to(dtype)


def is_close(found, expected):
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=1e-4, atol=1e-4)


every = pytest.mark.parametrize("name", MODULES)


@every
def test_a_deep_copy_is_independent(name):
    model = make(name)
    before, other = model(z()), moved(model)
    assert torch.equal(copy.deepcopy(model)(z()), before)
    assert torch.equal(other(z()), before) == (not list(model.parameters()))
    assert torch.equal(model(z()), before)


@every
def test_a_pickle_is_read_back(name):
    model = make(name)
    assert torch.equal(pickle.loads(pickle.dumps(model))(z()), model(z()))


@every
def test_a_state_dict_is_read_back(name):
    model = make(name)
    other = moved(model)
    other.load_state_dict(written_and_read(model.state_dict()), strict=True)
    assert torch.equal(other(z()), model(z()))


@every
def test_a_state_dict_is_assigned_with_its_dtype(name):
    model = make(name)
    other = moved(model)
    state = {key: value.double() for key, value in written_and_read(model.state_dict()).items()}
    other.load_state_dict(state, strict=True, assign=True)
    assert all(parameter.dtype == torch.float64 for parameter in other.parameters())
    is_close(other.double()(z(torch.float64)), model(z()))  # buffers that the state lacks, of a prior or a flow


@every
def test_a_module_made_without_memory_gets_all_of_its_values_from_a_state_dict(name):
    """As with fully_shard: made on "meta", then to_empty, whose memory holds anything, then load_state_dict."""
    if name == "flow":
        pytest.skip("a flow has buffers of its own library")
    model = make(name)
    other = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    for buffer in other.buffers():
        buffer.fill_(torch.nan)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(z()), model(z()))


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_module_changes_its_dtype(name, dtype):
    model = make(name)
    before = model(z())
    out = model.to(dtype)(z(dtype))
    assert out.dtype == (torch.float64 if dtype == torch.float64 else out.dtype)
    if dtype == torch.float64:
        is_close(out, before)


@every
def test_a_module_runs_on_meta(name):
    assert make(name).to("meta")(z().to("meta")).shape == (5,)


@every
def test_an_average_of_models_follows_them(name):
    model = make(name)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    average.update_parameters(model)
    expected = moved(model, 0.25)
    average.update_parameters(moved(model))
    is_close(average(z()), expected(z()))


@every
def test_a_functional_call_has_the_given_parameters(name):
    model = make(name)
    other = moved(model)
    parameters = {key: value.detach() for key, value in other.named_parameters()}
    is_close(torch.func.functional_call(model, parameters, (z(),)), other(z()))


@every
def test_stacked_modules_run_under_vmap(name):
    models = [make(name), moved(make(name))]
    state = torch.func.stack_module_state(models)

    def call(parameters, buffers):
        return torch.func.functional_call(models[0], (parameters, buffers), (z(),))

    found = torch.func.vmap(call, randomness="same")(*state) if any(state) else torch.stack([m(z()) for m in models])
    is_close(found, torch.stack([model(z()) for model in models]))


class Shift(nn.Module):
    def forward(self, x):
        return x + 1

    def right_inverse(self, x):
        return x - 1


@every
def test_parameters_may_be_parametrised(name):
    model = make(name)
    before = model(z())
    for key in [key for key, _ in model.inner.named_parameters()]:
        owner, _, own = key.rpartition(".")
        parametrize.register_parametrization(model.inner.get_submodule(owner), own, Shift())
    is_close(model(z()), before)
    found = torch.autograd.grad(model(z()).sum(), list(model.parameters())) if list(model.parameters()) else ()
    assert all(gradient.isfinite().all() for gradient in found)
    is_close(copy.deepcopy(model)(z()), before)


@every
def test_a_frozen_module_has_no_gradient(name):
    assert not make(name).requires_grad_(False)(z()).requires_grad


@every
def test_training_and_evaluation_are_the_same(name):
    model = make(name)
    assert torch.equal(model.eval()(z()), model.train()(z()))


@every
def test_an_optimiser_moves_every_parameter(name):
    model = make(name)
    parameters = dict(model.named_parameters())
    if not parameters:
        return
    before = {key: value.detach().clone() for key, value in parameters.items()}
    optimiser = torch.optim.AdamW(parameters.values(), lr=0.1, weight_decay=0.0)
    (model(z()) * torch.arange(1.0, 6.0)).sum().backward()
    optimiser.step()
    still = [key for key, value in parameters.items() if torch.equal(value, before[key])]
    assert still == []


# The states that 0.1.0 wrote.
STATES = {
    "standard": {},
    "normal": {"mu": (D,), "logvar": (D,)},
    "diag": {"logits": (K,), "means": (K, D), "logvars": (K, D)},
    "spherical": {"logits": (K,), "means": (K, D), "logvars": (K, 1)},
    "tied": {"logits": (K,), "means": (K, D), "logvars": (1, D)},
    "full": {"logits": (K,), "means": (K, D), "log_diagonal": (K, D), "lower": (K, D * (D - 1) // 2)},
    "vamp": {"pseudo_inputs": (K, 5), "logits": (K,)},
    "per position": {"prior.logits": (K,), "prior.means": (K, D), "prior.logvars": (K, D)},
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_the_first_version_is_read(name):
    model = MODULES[name]()
    model.load_state_dict({key: torch.ones(shape) for key, shape in STATES[name].items()}, strict=True)
    assert all(bool((value == 1).all()) for value in model.state_dict().values())


def test_priors_made_without_memory_have_their_first_values_after_reset_parameters():
    with torch.device("meta"):
        made = [priors.LearnedNormal(D), priors.GaussianMixture(K, D)]
    for prior in made:
        prior.to_empty(device="cpu")
        prior.reset_parameters()
        assert all(value.isfinite().all() for value in prior.parameters())
    assert torch.equal(made[0].mu, torch.zeros(D))
