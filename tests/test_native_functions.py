"""The functions used by the C loops, one by one: as accurate as documented, and vectorised."""

import ctypes
import re
import subprocess

import numpy as np
import pytest
import torch

from fastkl.native import _build

from helpers import DEVICE

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="CPU tensors"),
    pytest.mark.skipif(_build._compiler() is None, reason="no C compiler"),
]

LOOPS = """
#include "halves.h"
#include "parameters.h"
void logarithms(const REAL *x, REAL *restrict y, int n) { for (int i = 0; i < n; i++) y[i] = logarithm(x[i]); }
void exponentials(const REAL *x, REAL *restrict y, int n) { for (int i = 0; i < n; i++) y[i] = exponential(x[i]); }
void from_b(const uint16_t *x, REAL *restrict y, int n) { load_halves(BFLOAT16, x, 1, y, n); }
void from_f(const uint16_t *x, REAL *restrict y, int n) { load_halves(FLOAT16, x, 1, y, n); }
void to_b(const REAL *x, uint16_t *restrict y, int n) { store_halves(BFLOAT16, y, 1, x, n); }
void to_f(const REAL *x, uint16_t *restrict y, int n) { store_halves(FLOAT16, y, 1, x, n); }
"""


def compiled(folder, *options) -> tuple[ctypes.CDLL, str]:
    """LOOPS as a library, and the compiler's output."""
    source, library = folder / "loops.c", folder / "loops.so"
    source.write_text(LOOPS)
    files = ["-shared", str(source), str(_build.SOURCES / _build.BOUNDS), "-o", str(library)]
    command = [*_build._compiler(), *_build.FLAGS, *options, f"-I{_build.SOURCES}", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return ctypes.CDLL(str(library)), done.stderr


def run(function, values: np.ndarray, out: np.dtype) -> np.ndarray:
    result = np.full(len(values), -1).astype(out)
    function(values.ctypes.data_as(ctypes.c_void_p), result.ctypes.data_as(ctypes.c_void_p), len(values))
    return result


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_exponential_and_logarithm_are_right_to_one_and_a_half_units(dtype, tmp_path):
    """For all sizes and near 1; infinities and NaN are as in the definition."""
    library, _ = compiled(tmp_path, *["-DFLOAT64"] * (dtype == np.float64))
    limits, generator = np.finfo(dtype), np.random.default_rng(0)
    span = np.log(np.array([limits.tiny, limits.max], dtype=np.float64))
    sizes = generator.uniform(*(0.99 * span), 20_000)
    x = np.exp(np.concatenate([sizes, generator.normal(0, 0.1, 20_000), [0.0]])).astype(dtype)
    exact = np.log(x.astype(np.longdouble))
    error = np.abs(run(library.logarithms, x, dtype) - exact) / np.spacing(np.abs(exact).astype(dtype))
    assert error.max() <= 1.5
    exact = np.exp(sizes.astype(dtype).astype(np.longdouble))
    error = np.abs(run(library.exponentials, sizes.astype(dtype), dtype) - exact) / np.spacing(exact.astype(dtype))
    assert error.max() <= 1.5
    special = np.array([0.0, -0.0, limits.tiny, -1.0, -np.inf, np.inf, np.nan, limits.max], dtype)
    expected = [-np.inf, -np.inf, span[0], np.nan, np.nan, np.inf, np.nan, span[1]]
    np.testing.assert_allclose(run(library.logarithms, special, dtype), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_converts_as_in_torch(dtype, tmp_path):
    """All 65,536; and when stored also the halfway points, their neighbours, and numbers beyond the largest."""
    library, _ = compiled(tmp_path)
    load, store = (library.from_b, library.to_b) if dtype == torch.bfloat16 else (library.from_f, library.to_f)
    halves = np.arange(65536, dtype=np.uint16)
    wide = torch.from_numpy(halves.view(np.int16)).view(dtype).float()
    assert torch.equal(torch.from_numpy(run(load, halves, np.float32)).nan_to_num(7.0), wide.nan_to_num(7.0))
    step = 2 ** (15 if dtype == torch.bfloat16 else 12)  # half of a last place
    around = [wide.numpy().view(np.uint32) + np.uint32(more) for more in (0, 1, step - 1, step, step + 1, 2 * step - 1)]
    x = np.concatenate(around).view(np.float32)
    x = np.concatenate([x, np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32).view(np.float32)])
    stored = torch.from_numpy(run(store, x, np.uint16).view(np.int16)).view(dtype)
    expected = torch.from_numpy(x).to(dtype)
    assert torch.equal(stored.isnan(), expected.isnan())
    bits = (stored.masked_fill(stored.isnan(), 7.0), expected.masked_fill(expected.isnan(), 7.0))
    assert torch.equal(*(number.view(torch.int16) for number in bits))


@pytest.mark.parametrize("options", [(), ("-DFLOAT64",)], ids=["float32", "float64"])
def test_loops_over_parameters_are_vector_code(options, tmp_path):
    """Some compilers turn a nested conditional, or one on a setting, into a branch: three times slower."""
    version = subprocess.run([*_build._compiler(), "--version"], capture_output=True, text=True).stdout
    if "Free Software Foundation" not in version:
        pytest.skip("gcc says which loops it turns into vector code")
    files = [str(_build.SOURCES / "normal.c"), "-o", str(tmp_path / "normal.o")]
    command = [*_build._compiler(), *_build.FLAGS, *options, "-fopt-info-vec-optimized", "-c", *files]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    for header, kind in (("parameters.h", "for (int i"), ("halves.h", "stride == 1) for (int i")):
        vectors = set(map(int, re.findall(rf"{header}:(\d+):", said)))
        lines = (_build.SOURCES / header).read_text().splitlines()
        loops = {number for number, line in enumerate(lines, start=1) if kind in line}
        assert loops
        assert loops <= vectors
