"""The import arrows of the house, and what `import fastkl` must do without."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PUBLIC = (
    "fastkl.ops",
    "fastkl.reference",
    "fastkl.distributions",
    "fastkl.priors",
    "fastkl.remedies",
    "fastkl.monitors",
    "fastkl.objectives",
)
# Layer -> the layers it may import. The first that is a prefix of a module's name is its layer.
ARROWS = {
    "fastkl.reference": ("fastkl.reference",),
    "fastkl.ops._": ("fastkl.ops._", "fastkl.reference"),
    # A family imports its own modules; kernels and loops only inside functions, see the test below.
    **{
        f"fastkl.ops.{family}": (
            f"fastkl.ops.{family}",
            "fastkl.ops._",
            "fastkl.reference",
            f"fastkl.kernels.{family}",
            "fastkl.native",
            *others,
        )
        for family, others in {
            "normal": (),
            "likelihood": (),
            "categorical": (),
            "multivariate": (),
            "importance": (),
            "pairs": (),
            "mixture": ("fastkl.ops.categorical", "fastkl.ops.normal"),
            "transport": ("fastkl.ops.mixture", "fastkl.ops.normal"),
        }.items()
    },
    "fastkl.ops": (),
    "fastkl.kernels": ("fastkl.kernels",),
    "fastkl.native": ("fastkl.native",),
    "fastkl.schedules": (),
    "fastkl.distributions": ("fastkl.ops", "fastkl.reference"),
    "fastkl.priors": ("fastkl.ops", "fastkl.reference", "fastkl.distributions", "fastkl.priors"),
    "fastkl.remedies": ("fastkl.ops", "fastkl.reference", "fastkl.distributions", "fastkl.remedies"),
    "fastkl.monitors": (
        "fastkl.ops",
        "fastkl.reference",
        "fastkl.distributions",
        "fastkl.priors",
        "fastkl.monitors",
    ),
    "fastkl.objectives": (
        "fastkl.ops",
        "fastkl.reference",
        "fastkl.distributions",
        "fastkl.priors",
        "fastkl.remedies",
        "fastkl.objectives",
    ),
    "fastkl.integrations": (
        "fastkl.ops",
        "fastkl.reference",
        "fastkl.distributions",
        "fastkl.monitors",
        "fastkl.objectives",
        "fastkl.integrations",
    ),
    "fastkl.conformance": ("fastkl",),
    "fastkl._kl_divergence": ("fastkl.ops", "fastkl.distributions", "fastkl.priors"),
    "fastkl.vae": ("fastkl",),
    "fastkl.__main__": ("fastkl.vae",),
    "fastkl": (*PUBLIC, "fastkl.schedules", "fastkl._kl_divergence"),
}
# What a layer may import from outside, beside the standard library; integrations and vae choose for themselves.
OUTSIDE = {
    "fastkl.kernels": {"torch", "triton"},
    "fastkl.integrations": None,
    "fastkl.conformance": None,
    "fastkl.vae": None,
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("fastkl", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path for folder in ("fastkl", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))
}


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix if prefix.endswith("_") else prefix + ".")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_arrows(module):
    layer = next(layer for layer in ARROWS if within(module, layer))
    inside = {name for name in imports(MODULES[module]) if within(name, "fastkl")}
    wrong = {name for name in inside if not any(within(name, prefix) for prefix in ARROWS[layer])}
    assert not wrong, f"{module} may import {ARROWS[layer]}"
    allowed = OUTSIDE.get(layer, {"torch", "numpy"})  # what an installation always has
    outside = {name.partition(".")[0] for name in imports(MODULES[module]) - inside} - sys.stdlib_module_names
    assert allowed is None or outside <= allowed


def test_kernels_and_loops_are_imported_late():
    """When the first tensor arrives: a machine without Triton or a C compiler works, too."""
    for module, path in MODULES.items():
        if within(module, "fastkl.kernels") or within(module, "fastkl.native"):
            continue
        early = [node for node in ast.parse(path.read_text(encoding="utf-8")).body
                 if isinstance(node, (ast.Import, ast.ImportFrom))]  # fmt: skip
        names = [ast.unparse(node) for node in early]
        assert not [name for name in names if re.search(r"fastkl\.(kernels|native)", name)], module


def test_imports_make_no_circle():
    """Not even those inside functions and for types. A package and its modules are one another's."""
    arrows = {name: {other for other in imports(path) & MODULES.keys() if not name.startswith(other + ".")}
              for name, path in MODULES.items()}  # fmt: skip
    graphlib.TopologicalSorter(arrows).prepare()  # raises CycleError, which names the circle


def test_no_module_reads_a_private_attribute_of_a_posterior():
    """It has public names for what priors, objectives, remedies and monitors need."""
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    (posterior,) = (node for node in ast.walk(trees.pop("fastkl.distributions")) if isinstance(node, ast.ClassDef))
    private = {node.name for node in posterior.body if isinstance(node, ast.FunctionDef) and node.name[:2] != "__"}
    private = {name for name in private if name.startswith("_")}
    assert private
    read = [(name, ast.unparse(node)) for name, tree in trees.items() for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr in private
            and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))]  # fmt: skip
    assert read == []


def test_nobody_imports_the_name_kernels():
    """It belongs to another project; ours is fastkl.kernels."""
    files = [path for folder in ("fastkl", "kernels", "tests", "bench") for path in (ROOT / folder).rglob("*.py")]
    assert [path for path in files if any(within(name, "kernels") for name in imports(path))] == []


def test_the_map_names_every_folder_and_only_what_is_there():
    """Indented as they lie in one another, below "The house" of CONTRIBUTING.md."""
    lines = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## The house\n")[1].splitlines()
    named, inside = set(), {}
    for depth, name in re.findall(r"^((?:    )+)([a-z]+)/ ", "\n".join(lines), re.MULTILINE):
        inside[len(depth) // 4] = name
        named.add("/".join(inside[level] for level in range(1, len(depth) // 4 + 1)))
    tops = ("fastkl", "kernels", "docs", "tests", "bench", "examples")
    files = [path for top in tops for path in (ROOT / top).rglob("*") if path.is_file()]
    found = {path.parent.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    found = {folder for folder in found if not folder.startswith(("fastkl/kernels", "bench/results/"))}
    assert named == found


# What an installation may lack: the extras, by the names that are imported.
EXTRAS = {
    "PIL", "datasets", "geomloss", "h5py", "hypothesis", "matplotlib", "mlxtend", "ot", "rich", "scanpy", "scipy",
    "setuptools", "skimage", "sklearn", "tensorboard", "wheel", "zuko",
}  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.stem)
def test_tests_ask_for_what_may_be_missing(path):
    """By pytest.importorskip, or Package of helpers.py: an import would stop all tests where it fails."""
    assert not {name for name in imports(path) if name.partition(".")[0] in EXTRAS}


BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

blocked = {"triton"}
sys.meta_path.insert(0, Blocker())
import torch
import fastkl
"""

IMPORT = """
heavy = ("triton", "matplotlib", "rich", "tensorboard", "sklearn", "scipy", "PIL", "fastkl.vae", "fastkl.kernels",
         "fastkl.native", "fastkl.integrations")
loaded = [name for name in sys.modules for prefix in heavy if name == prefix or name.startswith(prefix + ".")]
assert not loaded, loaded
"""

# Op -> the shapes of its required arguments, where they are not all [3, 4]; None for what is not to be called.
_GMM = [(3, 4), (5,), (5, 4)]
SHAPES = {
    "GMMMoments": None,
    "gmm_log_prob": _GMM,
    "gmm_moments": None,  # has no gradient
    "gmm_responsibilities": _GMM,
    "kl_gmm": [(3, 4), *_GMM],
    "kl_gmm_bounds": [(3, 4), *_GMM],
    "rsample_gmm": [(5,), (5, 4)],
    "sample_gmm": None,  # has no gradient
    "sliced_wasserstein": None,  # also takes the number of projections
    "total_correlation": None,  # also takes the size of the data set
}

RUN_OPS = """
import inspect

public = {name: getattr(fastkl, name) for name in fastkl.__all__}
ops = {name: thing for name, thing in public.items() if getattr(thing, "__module__", "").startswith("fastkl.ops.")}
assert ops
for name, op in ops.items():
    required = [p for p in inspect.signature(op).parameters.values() if p.default is p.empty]
    shapes = SHAPES.get(name, [(3, 4)] * len(required))
    if shapes is None:
        continue
    tensors = [(torch.rand(shape) + 0.5).requires_grad_() for shape in shapes]
    outputs = op(*tensors)
    sum(output.square().sum() for output in ([outputs] if isinstance(outputs, torch.Tensor) else outputs)).backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in tensors), name
"""


@pytest.mark.parametrize("script", [IMPORT, RUN_OPS], ids=["import", "ops"])
def test_works_without_triton(script, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", f"{BLOCK}\nSHAPES = {SHAPES!r}\n{script}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
