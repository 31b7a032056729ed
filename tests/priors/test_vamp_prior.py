"""VampPrior: the mixture of equation 9, trained with an encoder that another module owns."""

import copy
import functools
import math

import pytest
import torch
from torch import nn

import fastkl
from fastkl.priors import VampPrior

from helpers import DEVICE

K, D, PIXELS = 4, 3, 6


class Autoencoder(nn.Module):
    """As users write it: the prior refers to the encoder, and forward computes the loss."""

    def __init__(self, **settings):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, 8), nn.Tanh(), nn.Linear(8, 2 * D))
        self.decoder = nn.Linear(D, PIXELS)
        self.prior = VampPrior(torch.rand(K, PIXELS), self.encoder, **settings)

    def posterior(self, x):
        return fastkl.DiagonalNormal.from_packed(self.encoder(x))

    def forward(self, x, **settings):
        q = self.posterior(x)
        reconstruction = fastkl.bernoulli_log_prob(x, self.decoder(q.rsample(seed=1)))
        return self.prior.kl(q, seed=2, **settings) - reconstruction


def autoencoder(seed: int = 0, **settings) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(**settings).to(DEVICE)


def data(count: int = 5) -> torch.Tensor:
    return torch.rand(count, PIXELS, generator=torch.Generator().manual_seed(7)).to(DEVICE)


@pytest.mark.parametrize("learn_weights", [True, False])
def test_density_is_the_mixture_of_the_posteriors(learn_weights):
    vae, z = autoencoder(learn_weights=learn_weights), torch.randn(5, D, device=DEVICE)
    if learn_weights:
        with torch.no_grad():
            vae.prior.logits.copy_(torch.randn(K))
    weights = torch.softmax(vae.prior.logits, 0) if learn_weights else torch.full((K,), 1 / K, device=DEVICE)
    each = [vae.posterior(u.unsqueeze(0)).log_prob(z) for u in vae.prior.pseudo_inputs]
    expected = torch.logsumexp(torch.stack(each, -1) + weights.log(), -1)
    torch.testing.assert_close(vae.prior.log_prob(z), expected)
    torch.testing.assert_close(
        vae.prior.responsibilities(z), torch.stack(each, -1) + weights.log() - expected.unsqueeze(-1)
    )
    assert ("prior.logits" in dict(vae.named_parameters())) == learn_weights
    q = vae.posterior(data())
    lower, upper = vae.prior.kl_bounds(q)
    assert (lower < upper).all()
    assert (vae.prior.kl(q, num_samples=2000).sub(upper) < 0.3).all()
    usage = vae.prior.usage(z)
    assert usage.shares.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert 0 < usage.entropy <= math.log(K) + 1e-5


def test_gradients_reach_pseudo_inputs_and_encoder_and_are_right():
    vae = autoencoder().double()
    prior, x = vae.prior, data().double()
    parameters = [prior.pseudo_inputs, prior.logits, *vae.encoder.parameters()]

    def loss(*values):
        for parameter, value in zip(parameters, values):
            parameter.data.copy_(value)
        q = vae.posterior(x)
        return sum(prior.kl(q, method=method, seed=3, num_samples=2).sum() for method in ("mc", "upper", "lower"))

    found = torch.autograd.grad(loss(*(p.detach().clone() for p in parameters)), parameters)
    generator = torch.Generator(DEVICE).manual_seed(1)
    for index, gradient in enumerate(found):
        values = [parameter.detach().clone() for parameter in parameters]
        direction = torch.randn(gradient.shape, generator=generator, device=DEVICE, dtype=torch.float64)
        ends = []
        for step in (1e-5, -1e-5):
            moved = [value + step * direction if i == index else value for i, value in enumerate(values)]
            ends.append(loss(*moved).item())
        loss(*values)
        slope = (gradient * direction).sum().item()
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)
        assert gradient.abs().max() > 1e-3


class Counting(nn.Module):
    calls = 0

    def __init__(self, returns):
        super().__init__()
        self.head, self.returns = nn.Linear(PIXELS, 2 * D), returns

    def forward(self, x):
        self.calls += 1
        return self.returns(self.head(x))


RETURNS = {
    "packed": lambda head: head,
    "image": lambda head: head.view(-1, 2 * D, 1, 1),
    "pair": lambda head: head.chunk(2, 1),
    "posterior": fastkl.DiagonalNormal.from_packed,
    "log_std": lambda head: fastkl.DiagonalNormal(head[:, :D], 0.5 * head[:, D:], scale="log_std"),
}


@pytest.mark.parametrize("kind", RETURNS)
def test_what_encoders_return_and_that_each_call_encodes_once(kind):
    torch.manual_seed(3)
    encoder = Counting(RETURNS[kind]).to(DEVICE)
    prior = VampPrior(torch.rand(K, PIXELS, device=DEVICE), encoder)
    mu, logvar = encoder.head(prior.pseudo_inputs).chunk(2, 1)
    z = torch.randn(3, D, device=DEVICE)
    torch.testing.assert_close(prior.log_prob(z), fastkl.gmm_log_prob(z, prior.logits, mu, logvar))
    q = fastkl.DiagonalNormal(z, z)
    calls = [
        lambda: prior.kl(q, num_samples=3), lambda: prior.kl(q, method="upper"), lambda: prior.kl_bounds(q),
        lambda: prior.usage(z), lambda: prior.sample(3), lambda: prior.responsibilities(z),
    ]  # fmt: skip
    for call in calls:
        encoder.calls = 0
        call()
        assert encoder.calls == 1


def test_the_transform_keeps_pseudo_inputs_in_range():
    seen = []
    encoder = nn.Linear(PIXELS, 2 * D).to(DEVICE)
    encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    start = torch.linspace(-3, 3, K * PIXELS, device=DEVICE).view(K, PIXELS)
    for transform in (torch.sigmoid, nn.Hardtanh(0, 1)):
        prior = VampPrior(start, encoder, transform=transform)
        prior.sample(1)
        assert torch.equal(seen[-1], transform(start))
    assert torch.equal(prior.pseudo_inputs, start)
    assert prior.pseudo_inputs.data_ptr() != start.data_ptr()


def test_the_encoder_stays_the_autoencoders_own(tmp_path):
    vae = autoencoder()
    assert set(vae.prior.state_dict()) == {"pseudo_inputs", "logits"}
    assert [name for name in vae.state_dict() if name.startswith("prior.")] == ["prior.pseudo_inputs", "prior.logits"]
    assert len(list(vae.prior.parameters())) == 2
    assert vae.prior.encoder is vae.encoder
    vae.prior.eval()
    assert vae.encoder.training
    other = autoencoder(seed=1)
    torch.save(vae.state_dict(), tmp_path / "vae.pt")
    other.load_state_dict(torch.load(tmp_path / "vae.pt", weights_only=True))
    z = torch.randn(4, D, device=DEVICE)
    assert torch.equal(vae.prior.log_prob(z), other.prior.log_prob(z))
    torch.save(vae, tmp_path / "whole.pt")
    for twin in (copy.deepcopy(vae), torch.load(tmp_path / "whole.pt", weights_only=False)):
        assert twin.prior.encoder is twin.encoder
        assert twin.encoder is not vae.encoder
        assert torch.equal(vae.prior.log_prob(z), twin.prior.log_prob(z))
    double = copy.deepcopy(vae).double()
    assert double.prior.log_prob(z.double()).dtype == torch.float64, "to() of the whole moves the encoder once"
    torch.testing.assert_close(double.prior.log_prob(z.double()), vae.prior.log_prob(z).double(), rtol=1e-4, atol=1e-4)


def test_distributed_data_parallel_finds_every_parameter_used(tmp_path):
    """find_unused_parameters is False: a parameter without gradient, or one registered twice, is an error."""
    if not torch.distributed.is_available():
        pytest.skip("this build has no torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        vae = autoencoder()
        plain, parallel = copy.deepcopy(vae), nn.parallel.DistributedDataParallel(vae)
        assert parallel.module.prior.encoder is parallel.module.encoder
        for method in ("mc", "upper", "mc"):
            for module in (plain, parallel):
                module.zero_grad()
                module(data(), method=method).mean().backward()
            for one, other in zip(plain.parameters(), vae.parameters()):
                torch.testing.assert_close(one.grad, other.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_torch_compile_makes_one_graph():
    vae = autoencoder()
    expected = vae(data())
    compiled = torch.compile(vae, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(data()), expected)


def test_training_uses_the_pseudo_inputs():
    """Two clusters of data: the prior's components spread over both, and the loss falls."""
    vae, x = autoencoder(), torch.eye(2, device=DEVICE).repeat_interleave(PIXELS // 2, 1).repeat(20, 1)
    optimiser = torch.optim.Adam(vae.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        optimiser.zero_grad()
        loss = vae(x, num_samples=2).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    with torch.no_grad():
        assert vae.prior.usage(vae.posterior(x).mean).used >= 2


def bad_encoder(returned):
    return VampPrior(torch.rand(K, PIXELS), lambda u: returned).sample(1)


BAD = {
    "ints": (lambda: VampPrior(torch.zeros(2, 3).long(), nn.Identity()), TypeError, "pseudo_inputs must be a floating"),
    "one": (lambda: VampPrior(torch.zeros(3), nn.Identity()), ValueError, r"pseudo_inputs must be \(K, \*datum\)"),
    "none": (lambda: VampPrior(torch.zeros(0, 3), nn.Identity()), ValueError, r"K > 0, got \(0, 3\)"),
    "encoder": (lambda: VampPrior(torch.zeros(2, 3), None), TypeError, "encoder must be callable"),
    "returns None": (lambda: bad_encoder(None), TypeError, "encoder must return .* got NoneType"),
    "returns odd": (lambda: bad_encoder(torch.zeros(K, 3)), ValueError, "even, got 3"),
    "returns fewer": (lambda: bad_encoder(torch.zeros(2, 6)), ValueError, "encoder must return 4 posteriors"),
    "returns three": (lambda: bad_encoder((1, 2, 3)), TypeError, "encoder must return .* got tuple"),
    "dim": (
        lambda: autoencoder().prior.kl(fastkl.DiagonalNormal(*torch.zeros(2, 2, 2, device=DEVICE))),
        ValueError,
        r"q has events of shape \(2,\), but the prior has 3",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def _nested(model):
    def inner(x):
        return model.encoder(x)

    return lambda x: inner(x)


# What users give for an encoder, beside the module itself.
FUNCTIONS = {
    "method": lambda model: model.posterior,
    "lambda": lambda model: lambda x: model.posterior(x),
    "nested": _nested,
    "default": lambda model: lambda x, encoder=model.encoder: encoder(x),
    "keyword": lambda model: lambda x, *, encoder=model.encoder: encoder(x),
    "partial": lambda model: functools.partial(lambda model, x: model.posterior(x), model),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_copy_calls_its_own_encoder(name):
    vae = autoencoder()
    vae.prior = VampPrior(torch.rand(K, PIXELS), FUNCTIONS[name](vae), transform=lambda x: x.clamp(0, 1)).to(DEVICE)
    twin = copy.deepcopy(vae)
    before = vae.prior.mixture().means
    torch.testing.assert_close(twin.prior.mixture().means, before)
    with torch.no_grad():
        for parameter in twin.encoder.parameters():
            parameter.zero_()
    assert twin.prior.mixture().means.abs().max() == 0
    assert torch.equal(vae.prior.mixture().means, before)
    twin.prior.mixture().means.sum().backward()
    assert all(parameter.grad is None for parameter in vae.parameters())
    again = copy.deepcopy(twin)
    assert again.prior.mixture().means.abs().max() == 0
    assert dict(twin.named_parameters()).keys() == dict(vae.named_parameters()).keys()


GLOBAL = nn.Linear(PIXELS, 2 * D, device=DEVICE)


def test_a_copy_that_cannot_have_its_own_encoder_says_so():
    prior = VampPrior(torch.rand(K, PIXELS), lambda x: GLOBAL(x)).to(DEVICE)
    with pytest.warns(UserWarning, match="shares the module GLOBAL"):
        copy.deepcopy(prior)
