"""gmm_moments: the sums of one step of expectation maximisation, against broadcasting; forward only."""

import torch

import fastkl
from bench.case import Case, leaves
from fastkl import reference


def broadcasting(z, logits, means, logvars):
    joint = reference.gmm_joint_log_prob(z, logits, means, logvars)
    responsibilities, difference = torch.softmax(joint, -1), z.unsqueeze(-2) - means
    sums = [torch.einsum("nk,nkd->kd", responsibilities, power) for power in (difference, difference.square())]
    return joint.logsumexp(-1), responsibilities.sum(0), *sums


def cases(device, quick):
    for n, k, d in [(128, 10, 8)] if quick else [(16384, 512, 64) if device == "cuda" else (4096, 100, 32)]:
        inputs = [tensor.detach() for tensor in leaves(device, (n, d), (k,), (k, d), (k, d))]
        # The eager formula is the definition itself.
        yield Case(f"{n} x {k} x {d}, forward", inputs, broadcasting, fastkl.gmm_moments, broadcasting)
