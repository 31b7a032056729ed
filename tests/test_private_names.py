"""fastkl works without any private name of torch, and uses them in one file only."""

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_layers import MODULES
from torch.utils._python_dispatch import TorchDispatchMode

from fastkl.ops import _call, _torch

OWNER = "fastkl.ops._torch"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def own_names(tree: ast.AST) -> set[str]:
    """Every name that a file defines, at the top or as an attribute."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("fastkl"):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}
OURS = functools.reduce(set.union, map(own_names, TREES.values())) | {name.rpartition(".")[2] for name in MODULES}
# Of the standard library, and documented there.
DOCUMENTED = {"_fields", "_replace"}


def foreign_private_names(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in OURS | DOCUMENTED:
            found.add(ast.unparse(node))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if any(map(is_private, alias.name.split(".")))}
        elif isinstance(node, ast.ImportFrom) and not node.module.startswith("fastkl"):
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name for name in names if any(map(is_private, name.split(".")))}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr") and len(node.args) > 1:
            name = getattr(node.args[1], "value", "")
            found |= {name} if isinstance(name, str) and is_private(name) and name not in OURS else set()
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_private_names_are_in_one_file(module):
    found = foreign_private_names(TREES[module])
    if module == OWNER:
        validation = {"distribution._validate_args", "distribution._validate_sample"}
        assert found == {"_forward_ad._current_level", *validation}
    else:
        assert not found


def test_private_names_are_seen_in_every_disguise():
    source = """
import torch._dynamo
from torch.utils._pytree import tree_map
from torch import _C
tensor._version
torch.autograd.graph._engine_run_backward
hasattr(torch, "_softmax_backward_data_of_another_release")
"""
    tree = ast.parse(source)
    assert foreign_private_names(tree) == {
        "torch._dynamo", "torch.utils._pytree.tree_map", "torch._C", "tensor._version",
        "torch.autograd.graph._engine_run_backward", "_softmax_backward_data_of_another_release",
    }  # fmt: skip


NAMES = (
    "_C._len_torch_dispatch_stack",
    "_C._are_functorch_transforms_active",
    "_C._get_tracing_state",
    "autograd._profiler_enabled",
    "Tensor._is_zerotensor",
    "autograd.forward_ad._current_level",
    "autograd.forward_ad._set_fwd_grad_enabled",
    "_C._functorch.is_batchedtensor",
    "_C._functorch.is_legacy_batchedtensor",
    "_disable_dynamo",
    "_softmax_backward_data",
    "utils._pytree.register_pytree_node",
    "utils._pytree.SequenceKey",
    "distributions.kl._KL_REGISTRY",
    "distributions.kl._KL_MEMOIZE",
    "distributions.kl._dispatch_kl",
    "autograd.Function",  # its apply that is above
)


def test_every_private_name_is_tried():
    asked = [node.args[0].value for node in ast.walk(TREES[OWNER])
             if isinstance(node, ast.Call) and ast.unparse(node.func) == "_private"]  # fmt: skip
    assert {*asked, "autograd.Function"} == set(NAMES)
    assert all(functools.reduce(getattr, name.split("."), torch) is not None for name in NAMES), "here they are"


class Quiet(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return op(*args, **(kwargs or {}))


def test_an_op_passes_by_an_idle_dispatcher():
    def dispatched(*args):
        raise AssertionError("called through the dispatcher")

    op = _call.direct("kl_normal_fwd", dispatched)
    inputs = torch.ones(2, 3), torch.zeros(2, 3), None, None, 1, "logvar", float("-inf"), float("inf"), False
    torch.testing.assert_close(op(*inputs), torch.full((2,), 1.5))
    for mode in (Quiet(), torch.autograd.profiler.profile()):
        with mode, pytest.raises(AssertionError, match="through the dispatcher"):
            op(*inputs)
    with pytest.raises(AssertionError, match="through the dispatcher"):
        op(torch._neg_view(-inputs[0]), *inputs[1:])


# fastkl.ops._torch sees a torch without some names; everything else, torch itself too, sees all of them.
WITHOUT = """
import importlib.util, json, logging, sys
import torch

logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
missing, path = json.loads(sys.argv[1]), sys.argv[2]


class Without:
    def __init__(self, there, names):
        self.there, self.names = there, names

    def __getattr__(self, name):
        if name in self.names:
            if name == "Function":
                return object
            raise AttributeError(name)
        below = [rest[len(name) + 1:] for rest in self.names if rest.startswith(name + ".")]
        found = getattr(self.there, name)
        return Without(found, below) if below else found


spec = importlib.util.spec_from_file_location("fastkl.ops._torch", path)
sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
sys.modules["torch"] = Without(torch, missing)
spec.loader.exec_module(module)
sys.modules["torch"] = torch
import fastkl
from fastkl.ops.mixture import rsample_gmm as mixtures
from fastkl.ops import _register, _torch
assert _torch is module


def leaf(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def triangles(a):
    return a.tril(-1) + torch.eye(3, dtype=a.dtype)


mixtures.CHUNK = 100  # so that a small sample is made by blocks
ops = {
    "kl_normal": (fastkl.kl_normal, [(3, 4), (3, 4)]),
    "kl_normal, prior": (fastkl.kl_normal, [(3, 4)] * 4),
    "rsample_kl": (lambda m, v: fastkl.rsample_kl(m, v, seed=5)[0].sin().sum(1), [(3, 4), (3, 4)]),
    "gumbel_softmax": (lambda x: fastkl.gumbel_softmax(x, 0.7, seed=5), [(3, 4)]),
    "gumbel_softmax, tau": (lambda x, t: fastkl.gumbel_softmax(x, t.exp(), seed=5), [(3, 4), ()]),
    "gmm_log_prob, full": (
        lambda z, w, m, a: fastkl.gmm_log_prob(z, w, m, scale_tril=triangles(a)), [(3, 3), (2,), (2, 3), (2, 3, 3)]
    ),
    "rsample_gmm, full": (
        lambda w, m, a: fastkl.rsample_gmm(w, m, scale_tril=triangles(a), num_samples=6, seed=5).sin().sum(-1),
        [(2,), (2, 3), (2, 3, 3)],
    ),
    "sinkhorn_divergence": (
        lambda x, y, w: fastkl.sinkhorn_divergence(x, y, weights_x=w.softmax(0), diameter=9.0), [(3, 4), (5, 4), (3,)]
    ),
}
found = {}
for name, (function, shapes) in ops.items():
    tensors = [leaf(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    value = function(*tensors)
    weights = torch.linspace(1, 2, value.numel(), dtype=value.dtype).view(value.shape)
    rows = [value, *torch.autograd.grad(value, tensors, weights, retain_graph=True)]
    if not name.startswith("sinkhorn"):  # whose gradient is refused one of its own
        twice = torch.autograd.grad(value, tensors, weights, create_graph=True)
        rows += torch.autograd.grad(sum(t.sin().sum() for t in twice), tensors, allow_unused=True, retain_graph=True)
        batched = torch.stack([weights, 2 - weights])
        rows += torch.autograd.grad(value, tensors, batched, retain_graph=True, is_grads_batched=True)
    several = [torch.stack([t, t + 1]).detach() for t in tensors]
    rows.append(torch.func.vmap(function)(*several))
    rows += torch.func.grad(lambda *t: function(*t).sum(), tuple(range(len(several))))(*tensors)
    with torch.no_grad():
        rows.append(function(*tensors))
    if len(sys.argv) > 3 and name in ("kl_normal", "gmm_log_prob, full"):
        torch._dynamo.reset()
        rows.append(torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors))
        rows += torch.autograd.grad(rows[-1], tensors, weights)
    found[name] = [None if row is None else row.flatten().tolist() for row in rows]
print(json.dumps(found))
"""


@functools.cache
def values_without(*missing: str, compiled: bool = False) -> tuple[dict, list[str]]:
    command = [sys.executable, "-c", WITHOUT, json.dumps(missing), _torch.__file__, *["compiled"] * compiled]
    root = Path(_torch.__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), [line for line in done.stderr.splitlines() if line.startswith("fastkl:")]


# Without the names that tell batches the fused backward pass is never taken: the others are also tried beside them.
BESIDE_BATCHES = tuple(name for name in NAMES if "batched" not in name)


@pytest.mark.parametrize("missing", [NAMES, BESIDE_BATCHES], ids=["all", "all but those that tell batches"])
def test_values_are_right_without(missing):
    expected, said = values_without(compiled=True)
    assert not said
    actual, said = values_without(*missing, compiled=True)
    assert actual.keys() == expected.keys()
    for name, rows in expected.items():
        for row, (value, other) in enumerate(zip(rows, actual[name], strict=True)):
            message = f"{name}, {row}"
            assert (value is None) == (other is None), message
            if value is not None:
                torch.testing.assert_close(torch.tensor(other), torch.tensor(value), msg=message, rtol=1e-6, atol=1e-8)
    assert len(said) == len(missing), "each is said, and once"
    assert all(any(name.rpartition(".")[2] in line for line in said) for name in missing)
