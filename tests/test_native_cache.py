"""Compiling and caching the native CPU code: calls work whatever the state of CC, the home folder and the disk."""

import hashlib
import os
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import fastkl
from fastkl.native import _build, _pack

from helpers import DEVICE, implementation

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="CPU tensors"),
    pytest.mark.skipif(_build._compiler() is None, reason="no C compiler"),
]


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """A process that has loaded nothing yet, with a cache of its own."""
    known = (_build._libraries, _pack._functions, _pack.plans)
    monkeypatch.setenv("FASTKL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_build, "FLAGS", tuple(flag.replace("-O3", "-O0") for flag in _build.FLAGS))  # sooner there

    def forget():
        for table in known:
            table.clear()
        _build._compiler.cache_clear()
        _build._machine.cache_clear()
        _build._said.clear()

    forget()
    yield forget
    monkeypatch.undo()
    forget()


def step() -> float:
    mu = torch.full((3, 4), 0.5, requires_grad=True)
    (fastkl.kl_normal(mu, mu).sum() + fastkl.rsample_kl(mu, mu, seed=1)[0].sum()).backward()
    return mu.grad.sum().item()


def test_compiled_once_in_a_private_folder_and_again_if_broken(anew, tmp_path, monkeypatch):
    """A truncated or modified library is not loaded but rebuilt."""
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
    """Both work, and leave only one library."""
    script = "import torch, fastkl\nprint(fastkl.kl_normal(torch.zeros(1, 2), torch.ones(1, 2)).item())"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FASTKL_CACHE": str(tmp_path / "cache")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-W", "error", "-c", script]
    started = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    for process in started:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert float(out) == pytest.approx(0.7182818, rel=1e-6)
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.fixture
def elsewhere(anew, monkeypatch, tmp_path):
    """Two short sources, and a folder for what is compiled outside the cache; that is empty in the end."""
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in ("one.c", "two.c", _build.BOUNDS):
        (sources / name).write_text(f"int {name[:3]}(void) {{ return 1; }}")
    monkeypatch.setattr(_build, "SOURCES", sources)
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(_build.tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


def load() -> tuple[list[str], bool]:
    """What the two short sources warn of, and whether they are there."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        libraries = [_build.library(family, torch.float32) for family in ("one", "two")]
    works = None not in libraries and libraries[0].one() == libraries[1].two() == 1
    return [str(warning.message) for warning in caught], works


def test_a_folder_of_others_is_not_trusted(elsewhere, anew, tmp_path, monkeypatch):
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    (tmp_path / "file").write_text("in the way")
    for cache, why in ((open_to_all, "is not private"), (tmp_path / "file" / "under", "file")):
        monkeypatch.setenv("FASTKL_CACHE", str(cache))
        anew()
        (warning,), works = load()
        assert works
        assert "again in each process" in warning
        assert why in warning
    assert not list(open_to_all.iterdir())


@pytest.mark.parametrize("state", ["full", "read-only", "noexec"])
def test_an_unusable_cache_is_bypassed(state, elsewhere, anew, tmp_path, monkeypatch):
    """With a full, read-only or noexec disk, the library is built elsewhere."""
    owner, name = {"full": (os, "replace"), "read-only": (Path, "mkdir"), "noexec": (_build.ctypes, "CDLL")}[state]
    function = getattr(owner, name)

    def refuse(*args, **more):
        if "/cache/" in f"{args[-1]}/":
            raise OSError(f"{args[-1]} is {state}")
        return function(*args, **more)

    monkeypatch.setattr(owner, name, refuse)
    (warning,), works = load()
    assert works
    assert "again in each process" in warning
    left = [path.name for path in (tmp_path / "cache").glob("*")]
    assert not left or (state == "noexec" and all(name.endswith(".so") for name in left))


def test_what_a_killed_process_left_is_cleared_away(elsewhere, tmp_path):
    """But not the build folder of a running process."""
    cache = tmp_path / "cache"
    for name in (".build-old", ".build-new"):
        (cache / name).mkdir(parents=True)
        (cache / name / "library.so").write_text("half of it")
    cache.chmod(0o700)
    os.utime(cache / ".build-old", (time.time() - 7200, time.time() - 7200))
    assert load() == ([], True)
    assert sorted(path.suffix or path.name for path in cache.iterdir()) == [".build-new", ".so", ".so"]


@pytest.mark.parametrize("given", [{}, {"HOME": "here"}, {"XDG_CACHE_HOME": "here"}, {"FASTKL_CACHE": "~nobody/it"}])
def test_without_a_home_nothing_is_made_in_the_working_folder(given, elsewhere, anew, tmp_path, monkeypatch):
    """`~` of an unknown user stays `~`, and XDG does not allow a relative path."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in ("HOME", "XDG_CACHE_HOME", "FASTKL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "pwd", None)  # as of a user without an entry, whose home is asked for here
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    (warning,), works = load()
    assert works
    assert "FASTKL_CACHE" in warning
    assert not list(here.iterdir())


def test_another_source_has_another_name(elsewhere, tmp_path, monkeypatch):
    """Stale code is never loaded: the name is a hash of everything the library was built from."""
    built = []
    monkeypatch.setattr(_build, "_compile", lambda source, options, path: built.append(path))
    monkeypatch.setattr(_build.ctypes, "CDLL", lambda path: path)
    for text in ("", "/* other */"):
        (_build.SOURCES / "tiles.h").write_text(text)
        _build.build("one", torch.float32)
    _build.build("one", torch.float64)
    assert len(set(built)) == 3


@pytest.mark.parametrize(("name", "value"), [("FASTKL_NATIVE", "0"), ("PATH", "/nowhere")])
def test_without_a_compiler_the_closed_forms(name, value, anew, monkeypatch, recwarn):
    """Without a warning if there is no compiler or native code is disabled."""
    with implementation("torch"):
        expected = step()
    monkeypatch.setenv(name, value)
    monkeypatch.delenv("CC", raising=False)
    anew()
    assert step() == pytest.approx(expected, rel=1e-6)
    assert set(_pack._functions.values()) == {None}
    assert not recwarn.list


def assert_goes_on(warning):
    """Calls use the closed forms, with one warning for all sources."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = step()
        fastkl.gumbel_softmax(torch.zeros(2, 3))
    assert set(_pack._functions.values()) == {None}
    with implementation("torch"):
        assert step() == pytest.approx(value, rel=1e-6)
    assert [warning in str(each.message) for each in caught] == [True]


@pytest.mark.parametrize("named", ["no-such-compiler", "no-such-compiler -m64", "'"])
def test_a_compiler_that_is_not_there_is_named(named, anew, monkeypatch):
    monkeypatch.setenv("CC", named)
    anew()
    assert_goes_on(f"CC={named!r} names no program")


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return path


@pytest.mark.parametrize("arguments", ["", " -pthread", " '-DTWO WORDS'", " gcc"])
def test_a_compiler_may_be_a_command_with_arguments(arguments, elsewhere, anew, tmp_path, monkeypatch):
    """Its path may contain spaces, and its output may not be UTF-8."""
    monkeypatch.delenv("CC", raising=False)
    anew()
    noisy = "printf 'avertissement: \\351t\\351\\n' >&2"
    if arguments == " gcc":  # as ccache is called
        compiler = script(tmp_path / "ccache", f'{noisy}\nshift\nexec {_build._compiler()[0]} "$@"')
    else:
        compiler = script(tmp_path / f"a{' ' * (not arguments)}b" / "cc", f'{noisy}\nexec {_build._compiler()[0]} "$@"')
    anew()
    monkeypatch.setenv("CC", f"{compiler}{arguments}")
    assert load() == ([], True)


def test_a_compiler_that_fails_is_named(anew, monkeypatch, tmp_path):
    """Once, whatever the output and encoding, both when asked for its version and for a source."""
    failing = script(tmp_path / "cc", "printf 'es ist kaputt \\374ber alles\\n' | tee /dev/stderr\nexit 1")
    monkeypatch.setenv("CC", str(failing))
    anew()
    assert_goes_on("es ist kaputt")
