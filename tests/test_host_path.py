"""Launches from the host: every kernel runs on its tensors' device, and nothing synchronises with the GPU.

Code that reads a value on the host synchronises, and cannot be captured in a CUDA graph. Tensors on "meta" have no
values, so code that runs on them, forward and backward, reads none.
"""

import ast
import contextlib
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_contract
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fastkl
from fastkl.kernels import _launch
from fastkl.kernels.normal.kl_normal import kl_normal_fwd_kernel
from fastkl.native import _build
from fastkl.ops import _call

from helpers import DEVICE, search_path

HERE = Path(__file__).parent
OPS = {
    **test_contract.OPS,
    **test_contract.SHARED,
    "gmm_moments": (lambda *t: fastkl.gmm_moments(*t)[1], lambda n: [(n, 4), (3,), (3, 4)]),
    "sample_gmm": (lambda *t: fastkl.sample_gmm(*t, num_samples=5)[0], lambda n: [(3,), (3, 4)]),
    "sinkhorn_divergence": (lambda *t: fastkl.sinkhorn_divergence(*t, diameter=9.0), lambda n: [(n, 4), (n, 4)]),
    "rsample_normal, torch's seed": (fastkl.rsample_normal, lambda n: [(n, 4), (n, 4)]),
}
# What reads a value, and says so: how far points lie apart, and torch.linalg.svd, whether it has converged.
WAITS = {
    "sinkhorn_divergence, no diameter": (fastkl.sinkhorn_divergence, lambda n: [(n, 4), (n, 4)]),
    "wasserstein2_multivariate_normal": OPS.pop("wasserstein2_multivariate_normal"),
}
WAITING = {"_linalg_svd", "_linalg_eigh", "linalg_inv_ex", "linalg_cholesky_ex", "linalg_lu_factor_ex", "_linalg_det"}
every = pytest.mark.parametrize("name", OPS)
gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")


class Watch(TorchDispatchMode):
    """Records the ops of fastkl, and raises on reading a value or moving one from or to the host."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        devices = {tensor.device.type for tensor in tree_leaves((args, kwargs, result)) if torch.is_tensor(tensor)}
        assert devices <= {"meta"}, f"{op} between {devices}"
        assert op._opname not in WAITING, f"{op} waits"
        if op.namespace == "fastkl":
            self.calls.append((op, tree_map_only(torch.Tensor, torch.Tensor.detach, args)))
        return result


def run(function, shapes, device="meta"):
    with Watch() as watch:
        inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
        value = function(*inputs)
        if value.requires_grad:
            torch.autograd.grad(value.sum(), inputs)
    return watch.calls


def test_every_public_function_is_here():
    public = {name for name in fastkl.__all__ if callable(getattr(fastkl, name)) and name.islower()}
    assert public == {name.partition(",")[0] for name in OPS | WAITS}


@every
def test_no_op_reads_a_value_or_moves_one(name):
    function, shapes = OPS[name]
    run(function, shapes(6))


def launched_as(run_kernel, monkeypatch):
    """kernel[grid](*args) is run_kernel(kernel, *args), for every kernel."""
    kind = type(kl_normal_fwd_kernel)
    monkeypatch.setattr(kind, "__getitem__", lambda kernel, grid: functools.partial(run_kernel, kernel))


@every
def test_no_launcher_does(name, monkeypatch):
    """Called without values, with the kernels left out; what it allocates is what the op's fake promises. Kernels are
    given no tuples of tuples, of which some versions of Triton lose entries."""

    def run_kernel(kernel, *args, **options):
        tuples = [arg for arg in (*args, *options.values()) if isinstance(arg, tuple)]
        assert not any(isinstance(entry, tuple) for entries in tuples for entry in entries), kernel.__name__

    launched_as(run_kernel, monkeypatch)
    function, shapes = OPS[name]
    for op, args in run(function, shapes(6)):
        with Watch(), torch.no_grad():
            made = _call.TRITON[op._opname](*args)
            made = _call.CLOSED_FORM[op._opname](*args) if made is NotImplemented else made
        for tensor, fake in zip(tree_leaves(made), tree_leaves(op(*args)), strict=True):
            assert (tensor is None) == (fake is None)
            assert tensor is None or (tensor.shape, tensor.stride(), tensor.dtype) == (
                (fake.shape, fake.stride(), fake.dtype)
            )


@every
def test_every_launch_is_on_the_device_of_its_tensors(name, monkeypatch):
    """Its tensors are taken for ones on cuda:1, while cuda:0 is the current device."""
    current, launches = [0], []

    @contextlib.contextmanager
    def device(wanted):
        current.append(torch.device(wanted).index)
        yield
        current.pop()

    monkeypatch.setattr(_launch, "device_of", lambda args: torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    launched_as(lambda kernel, *args, **options: launches.append((kernel, current[-1])), monkeypatch)
    function, shapes = OPS[name]
    for op, args in run(function, shapes(6)):
        with torch.no_grad():
            _call.TRITON[op._opname](*args)
    assert [kernel.__name__ for kernel, device in launches if device != 1] == []


def direct_launches(source):
    """The lines where a kernel[grid](...) is called."""
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)]
    return [call.lineno for call in calls if isinstance(call.func.value, (ast.Name, ast.Attribute))]


def test_every_kernel_is_launched_by_launch():
    """`launch` uses the device of the tensors."""
    folder = Path(_launch.__file__).parent
    found = {path.name: direct_launches(path.read_text()) for path in folder.rglob("*.py")}
    assert {name for name, lines in found.items() if lines} == {"_launch.py"}
    assert direct_launches("launch(kernel, (3,), x)\nkernel[(3,)](x)\nmodule.kernel[grid](\nx)") == [2, 3]


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_seen(name):
    function, shapes = WAITS[name]
    with pytest.raises((RuntimeError, AssertionError), match=r"item\(\) cannot be called|waits"):
        run(function, shapes(6))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: x.tolist(), lambda x: x.nonzero(),
        lambda x: x[x > 0], lambda x: bool(x.sum()), lambda x: x + torch.ones(3, 4), lambda x: torch.linalg.svd(x),
    ],
    ids=["item", "cpu", "tolist", "nonzero", "mask", "bool", "from the host", "svd"],
)  # fmt: skip
def test_a_read_would_be_seen(read):
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        run(lambda x: read(x) * x, [(3, 4)])


def test_launches_without_a_gpu():
    """tests/launches, in a process where Triton compiles and launches with a libcuda that only records."""
    if _build._compiler() is None:
        pytest.skip("needs a C compiler (cc, gcc, clang; CC), as Triton's own launcher does")
    environment = dict(os.environ, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="", PYTHONPATH=search_path(HERE))
    options = ["-q", "-p", "fake_driver", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, str(HERE / "launches")]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def step(name, seed):
    function, shapes = OPS[name]
    inputs = test_contract.draw(*shapes(6), dtype=torch.float32, seed=seed)

    def run():
        value = function(*inputs)
        return value, *(torch.autograd.grad(value.sum(), inputs) if value.requires_grad else ())

    return inputs, run


@gpu
@every
def test_on_a_gpu_every_call_gives_what_the_first_did(name):
    for seed in range(3):
        _inputs, run = step(name, seed)
        calls = []
        for _ in range(4):
            torch.manual_seed(seed)
            calls.append(run())
        for again in calls[1:]:
            torch.testing.assert_close(again, calls[0], rtol=0, atol=0)


def without_a_wait(run):
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@every
def test_on_a_gpu_a_step_is_captured_in_a_graph(name):
    inputs, run = step(name, 0)
    run()
    without_a_wait(run)  # a capture that fails half-way spoils the draws of the tests that follow
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiled
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (1, 2):
        others, run_others = step(name, seed)
        with torch.no_grad():
            for tensor, other in zip(inputs, others):
                tensor.copy_(other)
        graph.replay()
        if "seed" not in name and name != "sample_gmm":  # the graph has its own place in torch's stream of numbers
            torch.testing.assert_close(captured, run_others(), rtol=0, atol=0)
        assert all(tensor.isfinite().all() for tensor in captured)


@gpu
@every
def test_on_a_gpu_nothing_waits(name):
    _inputs, run = step(name, 0)
    run()
    for _ in range(3):
        without_a_wait(run)
