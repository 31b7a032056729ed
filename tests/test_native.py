"""The native CPU path: how its code is compiled and kept, and what it must not depend on."""

import hashlib
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastkl
from fastkl import reference
from fastkl.native import _build, _pack
from fastkl.ops import _register, _short

from helpers import DEVICE, implementation

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="CPU tensors"),
    pytest.mark.skipif(_build._compiler() is None, reason="no C compiler"),
]


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """A process that has loaded nothing yet, with a cache of its own."""
    known = (_build._libraries, _pack._functions, _pack.plans, _short._WAYS)
    monkeypatch.setenv("FASTKL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_build, "FLAGS", tuple(flag.replace("-O3", "-O0") for flag in _build.FLAGS))  # sooner there

    def forget():
        for table in known:
            table.clear()
        _build._compiler.cache_clear()
        _build._machine.cache_clear()

    forget()
    yield forget
    monkeypatch.undo()
    forget()


def step() -> float:
    mu = torch.full((3, 4), 0.5, requires_grad=True)
    (fastkl.kl_normal(mu, mu).sum() + fastkl.rsample_kl(mu, mu, seed=1)[0].sum()).backward()
    return mu.grad.sum().item()


def test_compiled_once_in_a_private_folder_and_again_where_broken(anew, tmp_path, monkeypatch):
    """A truncated library, or one with another byte, is not loaded but made again."""
    compiled, once = [], _build._compile
    monkeypatch.setattr(_build, "_compile", lambda *args: (compiled.append(args), once(*args)))
    expected = step()
    (library,) = (tmp_path / "cache").iterdir()
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert len(compiled) == 1
    anew()
    assert step() == expected
    assert len(compiled) == 1
    whole = library.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]):
        library.unlink()  # its pages are still those of a library that is loaded
        library.write_bytes(broken)
        anew()
        assert step() == expected
        assert library.read_bytes()[-32:] == hashlib.sha256(library.read_bytes()[:-32]).digest()
    assert len(compiled) == 4


def test_two_processes_that_compile_at_once(tmp_path):
    """Both work, and leave one library and nothing else."""
    script = "import torch, fastkl\nprint(fastkl.kl_normal(torch.zeros(1, 2), torch.ones(1, 2)).item())"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FASTKL_CACHE": str(tmp_path / "cache")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", script], env=environment, **pipes) for _ in range(2)
    ]
    for process in started:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert float(out) == pytest.approx(0.7182818, rel=1e-6)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_folder_of_others_is_not_trusted(tmp_path, monkeypatch):
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    monkeypatch.setenv("FASTKL_CACHE", str(open_to_all))
    own = _build.folder()
    assert own != open_to_all
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    monkeypatch.setenv("FASTKL_CACHE", str(tmp_path / "file" / "under"))
    (tmp_path / "file").write_text("in the way")
    assert _build.folder() == own


def test_another_source_has_another_name(tmp_path, monkeypatch):
    """Stale code is never found: the name is that of what the library was made from."""
    sources = tmp_path / "sources"
    sources.mkdir()
    for path in _build.SOURCES.glob("*.[ch]"):
        (sources / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv("FASTKL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_build, "SOURCES", sources)
    built = []
    monkeypatch.setattr(_build, "_compile", lambda source, options, path: built.append(path))
    monkeypatch.setattr(_build.ctypes, "CDLL", lambda path: path)
    for change in (b"", b"/* other */"):
        (sources / "tiles.h").write_bytes((sources / "tiles.h").read_bytes() + change)
        _build.build("normal", torch.float32)
    _build.build("normal", torch.float64)
    assert len(set(built)) == 3


@pytest.mark.parametrize(("name", "value"), [("FASTKL_NATIVE", "0"), ("PATH", "/nowhere"), ("CC", "no-such-compiler")])
def test_without_a_compiler_the_closed_forms(name, value, anew, monkeypatch, recwarn):
    """Quietly where there is none or it is turned off."""
    expected = step()
    monkeypatch.setenv(name, value)
    anew()
    assert step() == pytest.approx(expected, rel=1e-6)
    assert set(_pack._functions.values()) == {None}
    assert not recwarn.list


def test_a_compiler_that_fails_is_named(anew, monkeypatch, tmp_path):
    failing = tmp_path / "cc"
    failing.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
    failing.chmod(0o700)
    monkeypatch.setenv("CC", str(failing))
    with pytest.warns(UserWarning, match="(?s)goes on with torch's operations.*it is broken"):
        value = step()
    monkeypatch.delenv("CC")
    anew()
    assert step() == pytest.approx(value, rel=1e-6)


def everything(shape, dtype=torch.float32, event_ndim=1):
    generator = torch.Generator().manual_seed(0)
    mu, logvar = (torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(2))
    prior = [torch.randn(shape[-event_ndim:], generator=generator, dtype=dtype).requires_grad_() for _ in range(2)]
    z, kl = fastkl.rsample_kl(mu, logvar, *prior, event_ndim=event_ndim, seed=3)
    per_dim = fastkl.kl_normal_per_dim(mu, logvar, event_ndim=event_ndim)
    value = kl + fastkl.kl_normal(mu, logvar, event_ndim=event_ndim)
    total = value.sum() + z.square().sum() + per_dim.square().sum()
    return [z, value, per_dim, *torch.autograd.grad(total, [mu, logvar, *prior])]


# Many short rows; rows of more than a tile and more than a piece of work; one long row; one column.
@pytest.mark.parametrize("shape", [(9000, 5), (20, 3000), (2, 30_000), (1, 70_001), (40_000, 1)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(shape):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything(shape))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    with implementation("torch"):
        for actual, expected in zip(results[0], everything(shape)):
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_stays_visible(dtype):
    """As the definition has it, element by element; and underflow is no slower path nor a NaN."""
    special = [float("nan"), float("inf"), float("-inf"), 200.0, 800.0, -90.0, -104.0, -200.0, -1e4, 1e-30, 0.0]
    logvar = torch.tensor(special, dtype=dtype)[:, None].requires_grad_()
    mu = torch.full_like(logvar, 0.5).requires_grad_()
    eps = torch.ones_like(mu.detach())
    z, kl = fastkl.rsample_kl(mu, logvar, eps=eps)
    gradients = torch.autograd.grad([z, kl], [mu, logvar], [eps, torch.ones_like(kl)])
    exact = [t.detach().requires_grad_() for t in (mu, logvar)]
    wanted = list(reference.rsample_kl(*exact, eps=eps))
    wanted += torch.autograd.grad(wanted, exact, [eps, torch.ones_like(kl)])
    for actual, expected in zip([z, kl, *gradients], wanted):
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_small_sigma_keeps_its_digits(dtype):
    """In a sample and its gradient, next to a mean of 0: sigma is not 1 + (sigma - 1)."""
    logvar = torch.linspace(-160, 160, 641, dtype=dtype)[:, None].requires_grad_()
    mu, ones = torch.zeros_like(logvar), torch.ones_like(logvar)
    z, kl = fastkl.rsample_kl(mu, logvar, eps=ones)
    gradient = torch.autograd.grad([z, kl], logvar, [ones, torch.zeros_like(kl)])[0]
    sigma = logvar.detach().double().mul(0.5).exp()
    rtol = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(z.detach().double(), sigma, rtol=rtol, atol=0)
    # Times the KL's own gradient, of which nothing was asked: 0 times what is up to e^160.
    inside = (logvar.abs() < 85).flatten()
    torch.testing.assert_close(gradient.double()[inside], 0.5 * sigma[inside], rtol=rtol, atol=0)


@pytest.mark.parametrize("scale", ["logvar", "log_std", "std", "softplus"])
def test_every_scale_shows_what_is_not_finite(scale):
    special = [float("nan"), float("inf"), float("-inf"), 0.0, 1.0]
    parameter = torch.tensor(special)[:, None].requires_grad_()
    mu = torch.full_like(parameter, 0.5).requires_grad_()
    results = []
    for name in ("native", "torch"):
        with implementation(name):
            kl = fastkl.kl_normal(mu, parameter, scale=scale, bounds=(-5.0, 5.0))
            value = torch.stack([kl, fastkl.wasserstein2_normal(mu, parameter, scale=scale)])
            results.append([value, *torch.autograd.grad(kl.sum(), [mu, parameter])])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_the_short_way_is_the_same_loop():
    """To the last bit, forward and backward, whether or not the other output's gradient is there; it is taken for
    plain tensors alone, and gives way to the differentiable form."""
    mu, logvar = (torch.randn(6, 5, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in (0, 1))

    def run(function, outputs=None):
        out = function(mu, logvar)
        out = [out] if isinstance(out, torch.Tensor) else list(out)
        out = out if outputs is None else [out[i] for i in outputs]
        weights = [torch.linspace(0.5, 1, o.numel()).view(o.shape) for o in out]
        return [*out, *torch.autograd.grad(out, [mu, logvar], weights)]

    cases = [(fastkl.kl_normal, None), (fastkl.wasserstein2_normal, None)]
    cases += [(lambda m, v: fastkl.rsample_normal(m, v, seed=2), None)]
    cases += [(lambda m, v: fastkl.rsample_kl(m, v, seed=2), outputs) for outputs in (None, [0], [1])]
    for function, outputs in cases:
        short = run(function, outputs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_short, "find", lambda *args: None)
            long = run(function, outputs)
        assert all(torch.equal(a, b) for a, b in zip(short, long))
    value = fastkl.kl_normal(mu, logvar)
    assert type(value.grad_fn).__name__ == "_ValueBackward"
    (first,) = torch.autograd.grad(value.sum(), logvar, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), logvar)
    torch.testing.assert_close(second, 0.5 * logvar.exp())
    with torch.no_grad():
        assert torch.equal(fastkl.kl_normal(mu, logvar), value)
    with FlopCounterMode(display=False):  # a dispatch mode listens
        assert type(fastkl.kl_normal(mu, logvar).grad_fn).__name__ == "_KLNormalBackward"


def test_a_plan_is_made_once_for_a_shape_and_kept_within_bounds(monkeypatch):
    monkeypatch.setattr(_pack, "MOST_PLANS", 4)
    _pack.plans.clear()
    for _ in range(3):
        for columns in range(1, 7):
            mu = torch.ones(2, columns)
            kl = fastkl.kl_normal(mu, mu, bounds=(-1.0, 1.0))
            torch.testing.assert_close(kl, torch.full((2,), columns * 0.5 * 1.7182818))
    assert 1 <= len(_pack.plans) <= 4
    assert set(_register.NATIVE) < set(_register.CPU)


def test_sources_have_no_warnings():
    """With every warning that the compiler has by its two usual switches."""
    for source in sorted(_build.SOURCES.glob("*.c")):
        for options in ((), ("-DFLOAT64",)):
            flags = [flag for flag in _build.FLAGS if flag not in ("-w", "-O3")]
            flags += ["-Wno-unused-function"]  # a header has more than each source needs
            command = [
                _build._compiler(),
                *flags,
                *options,
                "-Wall",
                "-Wextra",
                "-O1",
                "-c",
                str(source),
                "-o",
                os.devnull,
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "warning" not in done.stderr, done.stderr


def test_large_results_ask_for_large_pages():
    """The system's own record of the mapping says so."""
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        pytest.skip("no transparent large pages here")
    if "[madvise]" not in setting:
        pytest.skip("the system decides alone")

    def flags(tensor: torch.Tensor) -> list[str]:
        middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
                inside = start <= middle < end
            elif inside and line.startswith("VmFlags:"):
                return line.split()[1:]
        raise AssertionError("not mapped")

    head = torch.zeros(2048, 8192).requires_grad_()
    z, kl = fastkl.DiagonalNormal.from_packed(head, dim=1).rsample_kl()
    gradient = torch.autograd.grad([z, kl], head, [torch.ones_like(z), torch.ones_like(kl)])[0]
    assert "hg" in flags(z)
    assert "hg" in flags(gradient)
    if os.environ.get("THP_MEM_ALLOC_ENABLE") != "1":  # torch asks for them itself
        assert "hg" not in flags(torch.zeros(2048, 8192))
    small = fastkl.rsample_normal(torch.zeros(2047, 4096), torch.zeros(2047, 4096))  # malloc may have it at hand
    assert "hg" not in flags(small)
