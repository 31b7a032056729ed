"""A VAE of single cells: counts of genes, a negative binomial likelihood, and a mixture that finds the cell types.

The cells are drawn here, so that the types are known; give your own counts [cells, genes] instead.

python examples/train_single_cells.py [--steps 1500]
"""

import argparse

import torch
from scipy.optimize import linear_sum_assignment
from torch import distributions, nn

import fastkl

CELLS, GENES, TYPES, LATENT = 2000, 200, 6, 8

options = argparse.ArgumentParser()
options.add_argument("--steps", type=int, default=1500)
steps = options.parse_args().steps
warm_up = steps // 3

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
labels = torch.randint(TYPES, (CELLS,))
profiles = torch.randn(TYPES, GENES).mul(0.7).softmax(dim=1)  # the share of each gene in a type
depth = torch.empty(CELLS, 1).log_normal_(6.5, 0.4)  # the expected counts of a cell
rate = distributions.Gamma(2.0, 2.0 / (depth * profiles[labels])).sample()  # overdispersed: variance m + m^2 / 2
counts = torch.poisson(rate).to(device)  # [CELLS, GENES]

encoder = nn.Sequential(nn.Linear(GENES, 128), nn.SiLU(), nn.Linear(128, 2 * LATENT)).to(device)
decoder = nn.Sequential(nn.Linear(LATENT, 128), nn.SiLU(), nn.Linear(128, GENES)).to(device)
log_size = nn.Parameter(torch.zeros(GENES, device=device))  # of each gene: variance m + m^2 / size
prior = fastkl.priors.GaussianMixture(TYPES, LATENT).to(device)
weights = [*encoder.parameters(), *decoder.parameters(), log_size, *prior.parameters()]
optimizer = torch.optim.AdamW(weights, lr=2e-3)


def posterior(x):
    shares = x / x.sum(dim=1, keepdim=True)
    return fastkl.DiagonalNormal.from_packed(encoder((1 + 1e4 * shares).log()), dim=1)


def log_likelihood(x, z):
    """ln p(x | z) of each cell in nats, given the sum of its counts."""
    log_mean = decoder(z).log_softmax(dim=-1) + x.sum(dim=1, keepdim=True).log()
    given_z = distributions.NegativeBinomial(log_size.exp(), logits=log_mean - log_size, validate_args=False)
    return given_z.log_prob(x).sum(dim=-1)


for step in range(1, steps + 1):
    if step == warm_up:  # the posteriors have separated: start the mixture from them
        with torch.no_grad():
            prior.fit(posterior(counts).mean, seed=0, regularisation=0.01)
    x = counts[torch.randint(CELLS, (128,), device=device)]
    q = posterior(x)
    learned = prior if step >= warm_up else None  # N(0, I) before
    loss = fastkl.objectives.elbo(q, learned, lambda z, x=x: log_likelihood(x, z)).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 500 == 0 or step == steps:
        print(f"step {step}: ELBO {-loss.item():.1f} nats per cell")

with torch.no_grad():
    found = prior.responsibilities(posterior(counts).mean).argmax(dim=1).cpu()
table = torch.zeros(TYPES, TYPES).index_put_((found, labels), torch.ones(CELLS), accumulate=True)
rows, columns = linear_sum_assignment(-table.numpy())  # the best match of components and types
print(f"clustering accuracy {table[rows, columns].sum() / CELLS:.3f}, with no label seen")
