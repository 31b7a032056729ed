"""Results are bit-identical from run to run, also on a GPU: fastkl does not use torch functions that sum by atomics."""

import ast

import pytest
import torch
from test_layers import MODULES

from fastkl import reference
from fastkl.ops import _sampling
from fastkl.ops.transport import sliced_wasserstein as transport
from fastkl.priors import _fit

# Functions with a nondeterministic order of sums on CUDA, also in gradients (torch.use_deterministic_algorithms).
WITHOUT_ORDER = {
    "index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "index_reduce",
    "index_reduce_", "put_", "index_put", "index_put_", "histc", "histogram", "cumsum", "cumprod", "logcumsumexp",
    "gather", "take_along_dim", "take", "index_select", "repeat_interleave", "segment_reduce", "embedding",
    "embedding_bag", "median", "nanmedian", "kthvalue", "interpolate", "grid_sample", "cumulative_trapezoid",
    "nll_loss", "cross_entropy", "ctc_loss", "grid_sampler",
}  # fmt: skip
# Allowed uses.
ALLOWED = {
    ("fastkl.ops.transport.sliced_wasserstein", "index_add"),  # on a CPU, where it is one loop
    ("fastkl.ops._sampling", "cumsum"),  # of more than one row, which a GPU adds in order
    ("fastkl.vae.data.scaling", "interpolate"),  # of data, which have no gradient, on the CPU
    ("fastkl.vae.pictures", "median"),  # NumPy's
}
# The gather of processes.
GROUP = ("_group", "fastkl.ops._group")


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [(node.func.attr, node) for node in nodes if ast.unparse(node.func.value) not in GROUP]


def without_order(tree: ast.AST) -> set[str]:
    found = {name for name, _ in calls(tree) if name in WITHOUT_ORDER}
    for name, node in calls(tree):
        given = {keyword.arg for keyword in node.keywords}
        if "accumulate" in given or (name == "bincount" and ("weights" in given or len(node.args) > 2)):
            found.add(name)
    return found


@pytest.mark.parametrize("module", [module for module in MODULES if not module.startswith("fastkl.kernels")])
def test_nothing_is_added_without_an_order(module):
    found = without_order(ast.parse(MODULES[module].read_text(encoding="utf-8")))
    assert {(module, name) for name in found} <= ALLOWED


def test_what_adds_without_an_order_is_seen():
    source = "x.index_add_(0, i, v)\ntorch.bincount(i, weights=w)\nx.put(i, v, accumulate=True)\n_group.gather(g, x)"
    assert without_order(ast.parse(source)) == {"index_add_", "bincount", "put"}


@pytest.mark.parametrize("sizes", [(20, 15), (7, 20), (1, 9), (9, 1), (1, 1), (12, 60), (40, 3)], ids=str)
def test_sums_of_pieces_have_the_values_of_index_add(sizes, monkeypatch):
    """On a GPU, and in a compiled graph, they are made of each quantile's own pieces; here the compiler is played."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, sum(sizes), dtype=torch.float64, generator=generator, requires_grad=True)
    _, *pieces = reference.quantile_segments(*sizes)
    for n, of in zip(sizes, pieces):
        expected = transport._sums_of_pieces(values, of, n)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            actual = transport._sums_of_pieces(values, of, n)
        torch.testing.assert_close(actual, expected)
        weights = torch.randn(actual.shape, dtype=torch.float64, generator=generator)
        gradients = [torch.autograd.grad(result, values, weights)[0] for result in (actual, expected)]
        assert torch.equal(*gradients)


def test_running_sums_of_one_row_are_made_beside_another():
    """CUDA's scan of a single row has no fixed order; with two rows, each is added in order."""
    for shape in ((), (1,), (3,), (2, 3)):
        values = torch.rand(*shape, 50, dtype=torch.float64, device="meta")
        rows = []
        with Rows(rows):
            assert _sampling.running_sum(values).shape == values.shape
        assert min(rows) > 1
    values = torch.rand(4, 50, dtype=torch.float64)
    assert torch.equal(_sampling.running_sum(values), values.cumsum(-1))


class Rows(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the number of rows of each running sum."""

    def __init__(self, rows: list[int]):
        super().__init__()
        self.rows = rows

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if "cumsum" in op.name():
            self.rows.append(args[0].numel() // args[0].shape[args[1]])
        return op(*args, **(kwargs or {}))


def test_sums_by_centre():
    """Those of the differences of each centre's data, whose order is the data's; a centre may have none."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 3, dtype=torch.float64, generator=generator)
    centres = torch.cat([rows[:4], torch.full((1, 3), 100.0, dtype=torch.float64)])
    nearest = _fit.assign(rows, centres)[0]
    groups = _fit._differences(rows, nearest, centres)
    for k, group in enumerate(groups):
        assert torch.equal(group, rows[nearest == k] - centres[k])
    counts, first = _fit._sums(groups, rows.dtype)
    assert counts.tolist() == torch.bincount(nearest, minlength=5).tolist()
    expected = torch.zeros_like(centres).index_add_(0, nearest, rows - centres[nearest])
    torch.testing.assert_close(first, expected)
