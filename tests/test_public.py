"""The public surface: sorted, resolvable, typed, documented."""

import ast
import importlib
import re
import types
from pathlib import Path

import pytest

import jaxprune
from jaxprune import sparse, storage

PACKAGE = Path(__file__).parents[1] / "jaxprune"
SOURCES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
DESIGN = """Method magnitude Element Global weights compute_masks apply_masks sparsity_of straight_through rewind
nonzero_masks prune cubic every keep_params_sparse regrow evidence oneshot trace costs layout_of compact sparse storage
save load"""


def rank(name):
    """ruff's RUF022: CONSTANTS, then Classes, then functions, each in order."""
    return (0 if re.fullmatch(r"[A-Z0-9_]{2,}", name) else 1 if name[0].isupper() else 2, name)


@pytest.mark.parametrize("module", [jaxprune, sparse, storage], ids=lambda m: m.__name__)
def test_all_is_sorted_unique_and_resolves(module):
    assert module.__all__ == sorted(set(module.__all__), key=rank)
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_what_the_design_promises_is_there():
    assert set(DESIGN.split()) <= set(jaxprune.__all__)
    rooms = [name for name in jaxprune.__all__ if isinstance(getattr(jaxprune, name), types.ModuleType)]
    assert len(jaxprune.__all__) - len(rooms) <= 60
    assert {"compress", "apply", "matmul", "reference"} <= set(sparse.__all__)


def test_every_module_imports_and_says_what_it_is():
    for path, tree in SOURCES.items():
        importlib.import_module(".".join(("jaxprune", *Path(path).with_suffix("").parts)).removesuffix(".__init__"))
        assert ast.get_docstring(tree), path


def definitions(node, prefix=""):
    """Public functions and classes of a module, with the methods of the classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from definitions(child, f"{child.name}.")


def own_nodes(function):
    """Nodes of a function, those of functions inside it left out."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            yield child
            yield from own_nodes(child)


def parameters(function, is_method):
    args = function.args
    positional = [*args.posonlyargs, *args.args]
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list)
    named = positional[1:] if is_method and not static else positional
    return [*named, *args.kwonlyargs, *(arg for arg in (args.vararg, args.kwarg) if arg)]


PUBLIC = [(f"{path}:{name}", node) for path, tree in SOURCES.items() for name, node in definitions(tree)]
FUNCTIONS = [(name, node) for name, node in PUBLIC if not isinstance(node, ast.ClassDef)]


def test_there_is_something_to_look_at():
    assert len(FUNCTIONS) > 50
    assert any(name == "granularity.py:Block.pool" for name, _ in FUNCTIONS)


def test_everything_public_has_a_docstring():
    assert [name for name, node in PUBLIC if not ast.get_docstring(node)] == []


def test_every_parameter_and_return_has_a_type():
    bare = [
        f"{name}({arg.arg})"
        for name, node in FUNCTIONS
        for arg in parameters(node, "." in name.split(":")[1])
        if arg.annotation is None
    ]
    assert bare == []
    assert [name for name, node in FUNCTIONS if node.returns is None] == []


def test_arrays_have_shapes_and_dtypes():
    """`Array` or `np.ndarray` alone says neither; jaxtyping's `Float[Array, "in out"]` says both."""

    def bare(annotation):
        if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) not in ("tuple", "list", "Sequence"):
            return False
        if isinstance(annotation, ast.Name | ast.Attribute):
            return ast.unparse(annotation) in ("Array", "jax.Array", "np.ndarray", "jnp.ndarray")
        return any(bare(child) for child in ast.iter_child_nodes(annotation))

    core = [(name, node) for name, node in FUNCTIONS if not name.startswith(("lab/", "cli.py"))]
    annotations = [
        (name, annotation)
        for name, node in core
        for annotation in (node.returns, *(arg.annotation for arg in parameters(node, False)))
        if annotation is not None
    ]
    assert [f"{name}: {ast.unparse(a)}" for name, a in annotations if bare(a)] == []


def test_functions_that_raise_say_so():
    silent = []
    for name, node in FUNCTIONS:
        raises = [child for child in own_nodes(node) if isinstance(child, ast.Raise) and child.exc is not None]
        if any("NotImplementedError" not in ast.unparse(child) for child in raises):
            doc = ast.get_docstring(node) or ""
            if not re.search(r"\bRaises\b", doc):
                silent.append(name)
    assert silent == []
