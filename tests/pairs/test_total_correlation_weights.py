"""total_correlation: its weights and estimates against torch.distributions, a known Gaussian, and others' code."""

import math

import pytest
import torch
from test_total_correlation import draw, every, implementation

import fastkl
from fastkl import reference

from helpers import DEVICE


@every
def test_agrees_with_torch_distributions(backend):
    """Row 2 of 4 of a data set of 10: the weights written out by hand."""
    z, mu, logvar = (tensor.detach() for tensor in draw(4, 3, torch.float64))
    normal = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    weights = torch.tensor([1 / 3, 1 / 3, 1 / 10, 7 / 30], dtype=torch.float64, device=DEVICE)
    choice = torch.distributions.Categorical(weights)
    q = torch.distributions.MixtureSameFamily(choice, torch.distributions.Independent(normal, 1)).log_prob(z[2])
    marginals = sum(
        torch.distributions.MixtureSameFamily(choice, torch.distributions.Normal(normal.loc[:, d], normal.scale[:, d]))
        .log_prob(z[2, d])
        for d in range(3)
    )  # fmt: skip
    own = normal.log_prob(z)[2].sum()
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z[2]).sum()
    with implementation(backend):
        found = torch.stack(fastkl.total_correlation(z, mu, logvar, 10))[:, 2]
    torch.testing.assert_close(found, torch.stack([own - q, q - marginals, marginals - prior]))


def test_a_gaussian_whose_parts_are_known():
    """x ~ N(0, S) and z = x + noise: q(z) is N(0, S + I s^2), and all three parts have a closed form."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    n, rho, variance = 1000, 0.8, 0.3
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64, device=DEVICE)
    x = torch.stack([x[:, 0], rho * x[:, 0] + math.sqrt(1 - rho**2) * x[:, 1]], 1) * 0.7
    z = x + math.sqrt(variance) * torch.randn(n, 2, generator=generator, dtype=torch.float64, device=DEVICE)
    found = fastkl.total_correlation(z, x, torch.full_like(x, math.log(variance)), n)
    of_z = torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64) * 0.49 + torch.eye(2, dtype=torch.float64) * variance
    mutual = 0.5 * (torch.logdet(of_z) - 2 * math.log(variance))
    total = 0.5 * (of_z.diagonal().log().sum() - torch.logdet(of_z))
    dimension_wise = 0.5 * (of_z.diagonal() - 1 - of_z.diagonal().log()).sum()
    assert [part.mean().item() for part in found] == pytest.approx(
        [float(part) for part in (mutual, total, dimension_wise)], abs=0.06
    )


def published_weights(batch, dataset_size):
    """The matrix of rtqichen/beta-tcvae, which disentangling-vae, Pythae and AntixK's PyTorch-VAE share: every
    (M + 1)-th element of a matrix of M + 1 columns is its first column, not its diagonal."""
    others = batch - 1
    weights = torch.full((batch, batch), 1 / others, dtype=torch.float64)
    weights.view(-1)[:: others + 1] = 1 / dataset_size
    weights.view(-1)[1 :: others + 1] = (dataset_size - others) / (dataset_size * others)
    weights[others - 1, 0] = (dataset_size - others) / (dataset_size * others)
    return weights


def test_stratified_weights_lie_on_the_diagonal():
    ours = reference.sample_weights(5, 5, 100, "mss", dtype=torch.float64)
    torch.testing.assert_close(ours.sum(1), torch.ones(5, dtype=torch.float64))
    assert ours.diagonal().tolist() == [1 / 100] * 5
    assert ours.roll(-1, 1).diagonal().tolist() == [(100 - 4) / (100 * 4)] * 5
    published = published_weights(5, 100)
    assert published[[0, 1, 2, 4], 0].tolist() == [1 / 100] * 4  # row 3's was overwritten last
    assert published.diagonal().tolist()[2:] == [1 / 4] * 3
    assert (published.sum(1) - 1).abs().max() > 0.1


def test_the_weight_counts_once_not_for_every_dimension():
    """Pythae and AntixK add its logarithm to the densities of all dimensions, and sum over these for the joint."""
    z, mu, logvar = (tensor.detach().cpu() for tensor in draw(6, 4, torch.float64))
    log_weights = reference.sample_weights(6, 6, 100, "mss", dtype=torch.float64).log()
    terms = torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(z[:, None])
    own = torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(z).sum(1)
    once = own - torch.logsumexp(log_weights + terms.sum(2), 1)
    for_every = own - torch.logsumexp((log_weights[:, :, None] + terms).sum(2), 1)
    actual = fastkl.total_correlation(*(t.to(DEVICE) for t in (z, mu, logvar)), 100).mutual_information.cpu()
    torch.testing.assert_close(actual, once)
    assert ((for_every - once) > 3.0).all()


def test_one_batch_data_set_is_its_aggregate_posterior():
    z, mu, logvar = draw(8, 3, torch.float64)
    weights = reference.sample_weights(8, 8, 8, "mss", dtype=torch.float64)
    torch.testing.assert_close(weights.sum(1), torch.ones(8, dtype=torch.float64))
    uniform = fastkl.total_correlation(z, mu, logvar, 8, weights="mws")  # 1 / 64 in place of 1 / 8
    terms = torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(z[:, None])
    joint = torch.logsumexp(terms.sum(2), 1) - math.log(64)
    own = torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(z).sum(1)
    torch.testing.assert_close(uniform.mutual_information, own - joint)


@every
def test_gradients_of_one_part_alone(backend):
    tensors = draw(4, 3, torch.float64)
    with implementation(backend):
        for index in range(3):
            actual, exact = (
                torch.autograd.grad(f(*tensors, 99)[index].sum(), tensors)
                for f in (fastkl.total_correlation, reference.total_correlation)
            )
            torch.testing.assert_close(actual, exact)
