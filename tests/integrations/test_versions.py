"""The libraries are the releases that fastkl was read and tested against. These tests fail when a newer one differs.

Then read what has changed, run the tests of the integration, and write down its version and checksum.
"""

import importlib
import importlib.metadata
import inspect
import re
import zlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "integrations").glob("[a-z]*.md")}


def releases_of(page: str) -> list[tuple[str, str]]:
    """(package, version), from a page's line "Tested with ..."."""
    line = re.search(r"^Tested with (.*)$", PAGES[page], re.MULTILINE)
    assert line, f"docs/integrations/{page}.md does not say what it was tested with"
    return re.findall(r"([a-z][\w-]*) (\d+(?:\.\d+)+)", line[1])


@pytest.mark.parametrize(
    ("page", "package", "version"), [(page, *each) for page in PAGES for each in releases_of(page)]
)
def test_the_installed_release_is_the_one_tested(page, package, version):
    """Its first two numbers: later ones are for mends, and the checksums below notice those that concern fastkl."""
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    assert installed.split(".")[:2] == version.split(".")[:2]


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"trainers"}))
def test_page_and_module_name_the_same_version(page):
    if page == "lightning":
        pytest.importorskip("lightning")
    assert releases_of(page)[0][1] == importlib.import_module(f"fastkl.integrations.{page}").TESTED


# Page -> (the module that is needed, what fastkl replaces or relies on, the checksum of its source).
READ = {
    "distributions": ("torch", ["torch.distributions.kl:_kl_normal_normal", "torch.distributions.kl:kl_divergence",
                                "torch.distributions.kl:_kl_independent_independent",
                                "torch.distributions:MixtureSameFamily.log_prob"], 4257670233),
    "pyro": ("pyro", ["pyro.infer:TraceMeanField_ELBO"], 3371136314),
    "scvi": ("scvi", ["scvi.module.base:MogPrior", "scvi.module.base:VampPrior",
                      "scvi.module.base:GaussianPrior"], 2936024349),
}  # fmt: skip


@pytest.mark.parametrize("page", READ)
def test_the_source_is_what_was_read(page):
    module, names, checksum = READ[page]
    pytest.importorskip(module)
    texts = []
    for name in names:
        where, _, path = name.partition(":")
        found = importlib.import_module(where)
        for part in path.split("."):
            found = getattr(found, part)
        texts.append(inspect.getsource(found))
    assert zlib.crc32("".join(texts).encode()) == checksum, f"torch {torch.__version__}"
