"""The site: it builds without a warning, its code runs, its links lead somewhere, and it names all that is public."""

import functools
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType
from urllib.parse import urlparse

import jax
import jax.numpy as jnp
import markdown_code
import numpy as np
import pytest

import jaxprune as jp

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if not path.relative_to(DOCS).parts[0].startswith("_"))
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md"]  # which a page includes
WITH_CODE = [path for path in TEXTS if markdown_code.python(path.read_text("utf-8"))]
MODULES = ["jaxprune", "jaxprune.criteria.evidence", "jaxprune.sparse.exports", "jaxprune.sparse.reference"]
MODULES += [f"jaxprune.{name}" for name in jp.__all__ if isinstance(getattr(jp, name), ModuleType)]
MODULES.remove("jaxprune.evidence")

needs_sphinx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("sphinx", "myst_parser", "furo")),
    reason="the site's packages are not installed: pip install '.[docs]'",
)


def title(path):
    return str(path.relative_to(ROOT))


def built(folder):
    """The built site; whatever Sphinx has to say is an error."""
    words = ["-m", "sphinx", "-W", "--keep-going", "-q", "-d", folder / "doctrees", DOCS, folder / "html"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return folder / "html"


@needs_sphinx
def test_the_site(tmp_path):
    """It builds without a warning, loads nothing from elsewhere, and describes every public name: in one test, since
    workers that share nothing would build it once each."""
    site = built(tmp_path)
    pages = {path.relative_to(site).with_suffix(".md") for path in site.rglob("*.html")}
    assert pages >= {path.relative_to(DOCS) for path in PAGES}
    loaded = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"((?:https?:)?//[^\"]+)")
    assert not [(page, found) for page in site.rglob("*.html") if (found := loaded.findall(page.read_text("utf-8")))]
    assert (site / "searchindex.js").exists()
    described = inventory(site)
    assert not [missing for name in MODULES for missing in undescribed(name, described)]


def inventory(site):
    """Names that the API reference describes, of Sphinx's `objects.inv`."""
    _, body = re.fullmatch(rb"((?:#[^\n]*\n){4})(.*)", (site / "objects.inv").read_bytes(), re.DOTALL).groups()
    lines = zlib.decompress(body).decode().splitlines()
    return {line.split()[0] for line in lines if line.split()[1].startswith("py:")}


def undescribed(name, described):
    """Public names of a module that are described neither there nor, if they are the same, at the top."""
    module = importlib.import_module(name)
    for one in public(module):
        value = getattr(module, one)
        if isinstance(value, ModuleType):
            places = {value.__name__, f"{value.__name__}.why_missing"}
        else:
            places = {f"jaxprune.{one}" if one in jp.__all__ and getattr(jp, one) is value else f"{name}.{one}"}
        if not places & described:
            yield f"{name}.{one}"


def public(module):
    """Names that a module offers: its `__all__`, else what it defines without an underscore."""
    names = getattr(module, "__all__", None)
    if names is None:
        defined = {name: value for name, value in vars(module).items() if inspect.getmodule(value) is module}
        names = [name for name, value in defined.items() if callable(value) and not name.startswith("_")]
    return names


def check_the_nnx_recipe(path, names):
    """Masks have the sparsity that was asked for, the file has the size that is told, sparse is what dense is."""
    alive = sum(int(jnp.sum(mask)) for mask in jax.tree.leaves(names["masks"]) if mask.ndim > 1)
    assert alive == round(0.1 * (64 * 256 + 256 * 10))
    assert alive == sum(int(jnp.sum(leaf != 0)) for leaf in jax.tree.leaves(names["params"]) if leaf.ndim > 1)
    told = re.search(r"(\d+) kB; dense it was (\d+)", path.read_text("utf-8"))
    dense = sum(leaf.nbytes for leaf in jax.tree.leaves((names["params"], names["rest"])) if leaf.dtype == jnp.float32)
    sizes = Path("net.jaxprune").stat().st_size / 1000, dense / 1000
    assert np.allclose(sizes, [int(number) for number in told.groups()], atol=1)
    logits = names["predict"](names["sparse_params"], names["x_test"])
    assert np.allclose(logits, names["model"](names["x_test"]), atol=1e-4)
    assert float(np.mean(logits.argmax(-1) == names["y_test"])) > 0.9


AFTERWARDS = {"docs/recipes/nnx.md": check_the_nnx_recipe}


@pytest.mark.usefixtures("relaxed", "quick")
@pytest.mark.parametrize("path", WITH_CODE, ids=title)
def test_the_code_of_a_page_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jp.sparse, "tune", functools.partial(jp.sparse.tune, repeats=5))
    names = {}
    markdown_code.run(path, names)
    AFTERWARDS.get(title(path), lambda path, names: None)(path, names)


@pytest.mark.parametrize("path", TEXTS, ids=title)
def test_blocks_are_written_as_the_tests_read_them(path):
    """A block of Python that no test runs says why; one that is indented, or has words behind its name, would not."""
    text = path.read_text("utf-8")
    blocks = markdown_code.blocks(text)
    written = re.findall(r"^\s*[`~:]{3,}\s*\{?(?:code-block\}? *)?py(?:thon)?\b", text, re.MULTILINE)
    assert len(written) == sum(block.language == "python" for block in blocks)
    assert all(block.mark in ("", "printed") or re.match(r"not run: \S", block.mark) for block in blocks)


@pytest.mark.parametrize("path", TEXTS, ids=title)
def test_links_to_elsewhere_are_well_formed(path):
    for link in re.findall(r"\]\((https?:[^)]*)\)|<(https?:[^>]*)>", path.read_text("utf-8")):
        address = urlparse("".join(link))
        assert address.scheme == "https", address.geturl()
        assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", address.netloc), address.geturl()
        assert " " not in address.geturl()


@pytest.mark.parametrize("path", sorted((DOCS / "figures").glob("*.html")), ids=title)
def test_pictures_are_those_that_are_drawn(path):
    """Written anew by `python docs/figures/pictures.py`."""
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "figures" / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    assert pictures.draw(path.stem) == path.read_text()
    if path.stem == "speed":
        assert pictures.for_the_readme() == path.with_suffix(".svg").read_text()
