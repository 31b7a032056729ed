"""docs/architecture.md: its table of ops is that of the registry, and what it names is there.

`python tests/test_architecture.py` writes the table.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastkl
from fastkl.ops import _call, _register

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- written by: python tests/test_architecture.py -->\n", "<!-- end -->\n"


def place(function, folder: str) -> str:
    """The path of a function's file in a folder of fastkl."""
    module = getattr(function, "func", function).__module__  # of a partial function, that of its function
    return module.removeprefix(f"fastkl.{folder}.").replace(".", "/")


def table() -> str:
    lines = ["| op | closed form | C | Triton |", "|---|---|---|---|"]
    for name, (kernel, native) in sorted(_register.LOADERS.items()):
        module, launcher = place(_call.CLOSED_FORM[name], "ops"), place(kernel(), "kernels")
        loop = f"`{place(native(), 'native')}.c`" if native else ""
        lines.append(f"| `{name}` | `{module}.py` | {loop} | `{launcher}.py` |")
    return "\n".join(lines) + "\n"


def test_the_table_is_that_of_the_registry():
    page = PAGE.read_text(encoding="utf-8")
    assert page[page.index(BEGIN) + len(BEGIN) : page.index(END)] == table()


def test_every_file_of_the_table_is_there():
    folders = [ROOT / "fastkl" / "ops", ROOT / "fastkl" / "native", ROOT / "kernels"]
    for row in table().splitlines()[2:]:
        for folder, cell in zip(folders, re.findall(r"\| ([^|]*) (?=\|)", row)[1:], strict=True):
            assert not cell or (folder / cell.strip("`")).is_file(), row


def test_every_name_of_the_page_is_in_the_code():
    """Of a function in backquotes, which a rename would leave behind."""
    page = PAGE.read_text(encoding="utf-8")
    code = "\n".join(path.read_text() for path in [*ROOT.glob("fastkl/**/*.[pch]*"), *ROOT.glob("kernels/**/*.py")])
    names = {name for name in re.findall(r"`(\w+)`", page) if not hasattr(fastkl, name)}
    assert "kl_terms_gradient" in names
    assert {name for name in names if not re.search(rf"\b{name}\b", code)} == set()


WRITING = ("kl_normal", "kl_normal_per_dim", "wasserstein2_normal", "rsample_normal", "rsample_kl", "normal_log_prob",
           "bernoulli_log_prob", "gmm_log_prob", "gmm_responsibilities", "kl_gmm", "kl_gmm_bounds", "gumbel_softmax",
           "total_correlation")  # fmt: skip


@pytest.mark.parametrize("op", WRITING)
def test_a_backward_op_writes_into_its_outputs(op):
    """And takes them one by one, in no list: one fake and one layout of arguments serve every kind of call."""
    schema = getattr(torch.ops.fastkl, f"{op}_bwd").default._schema
    assert not schema.returns
    written = {argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write}
    sets = ({"dmu", "dparameter"}, {"dx"}, {"dz", "dmeans"}, {"dmu", "dlogvar"}, {"dlogits", "dtau"}, {"dz", "dmu"})
    assert any(written >= outputs for outputs in sets)
    assert all(name.startswith("d") for name in written)
    assert not [argument.name for argument in schema.arguments if "List" in str(argument.type)]


def test_an_import_brings_neither_compiler_nor_kernels():
    """The compiler takes a second, and each implementation is imported by its first tensor."""
    heavy = (
        "torch._dynamo",
        "torch._inductor",
        "torch.distributed.tensor",
        "triton",
        "fastkl.kernels.normal",
        "fastkl.vae",
    )
    command = f"import sys, fastkl; sys.exit(' '.join(name for name in {heavy} if name in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
    PAGE.write_text(text[:start] + table() + text[stop:], encoding="utf-8")
