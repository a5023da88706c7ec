"""The house stands: imports go down only, siblings do not know each other, each library is known where it belongs."""

import ast
import functools
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from jaxprune.lab.commands.main import OF_THE_LAB

PACKAGE = Path(__file__).parents[1] / "jaxprune"
ROOMS = {
    0: ["compat", "types", "tree", "checks", "tables", "files"],
    1: ["exact", "layout", "schedules"],
    2: ["native", "masks", "granularity", "distributions", "tracing"],
    3: ["criteria", "report", "quantize"],
    4: ["methods", "sparse"],
    5: ["training", "channels", "storage"],
    6: ["search", "oneshot"],
    8: ["lab"],  # above the door, 7, the package's own `__init__`
}
LAB = {
    0: ["recipe"],
    1: ["data", "models", "checkpoints"],
    2: ["report"],
    3: ["runs"],  # whose last act is to write its page
    4: ["bench"],
    5: ["commands"],
}
FLOOR_OF_LAB = {f"jaxprune.lab.{room}": floor for floor, rooms in LAB.items() for room in rooms}
FLOOR = {f"jaxprune.{room}": floor for floor, rooms in ROOMS.items() for room in rooms}
CORE = {"jax", "numpy", "optax", "jaxtyping", "quax", "ml_dtypes"}
LAB_ONLY = {"flax", "orbax", "tensorflow_datasets", "matplotlib", "sklearn", "rich", "pydantic"}
# What sparse and storage may know of the rest, besides each other. `tracing` knows no pruner either: it says where a
# model uses its weights, and `sparse.tune` measures there.
SPARSE_KNOWS = {
    f"jaxprune.{room}" for room in (*ROOMS[0], *ROOMS[1], "native", "masks", "tracing", "sparse", "quantize", "storage")
}


def module_name(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
ROOMS_OF_ALL = sorted(set(MODULES) - {"jaxprune"})  # the door itself may know everything


def imports(tree, module, is_package, modules):
    """Names of the modules that a source imports, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            inner = {f"{base}.{alias.name}" for alias in node.names} & set(modules)
            found |= inner or {base}
    return found


@functools.cache
def imports_of(module):
    path = MODULES[module]
    return imports(ast.parse(path.read_text()), module, path.name == "__init__.py", MODULES)


def ours(module):
    return {name for name in imports_of(module) if name.split(".")[0] == "jaxprune"}


def theirs(module):
    return {name.split(".")[0] for name in imports_of(module)} - {"jaxprune"} - set(sys.stdlib_module_names)


def room(module, floors=FLOOR):
    """The entry of the table that a module belongs to, the longest that fits."""
    fits = [name for name in floors if module == name or module.startswith(name + ".")]
    assert fits, f"{module} stands on no floor: add it to ROOMS and to the design."
    return max(fits, key=len)


def test_imports_are_found_however_they_are_written():
    lines = ["import a.b", "from jaxprune import tree", "def f():", " from jaxprune.tree import x"]
    source = "\n".join([*lines, " from . import y", " from ..z import w"])
    found = imports(ast.parse(source), "jaxprune.sparse.dispatch", False, {"jaxprune.tree", "jaxprune.sparse.y"})
    assert found == {"a.b", "jaxprune.tree", "jaxprune.sparse.y", "jaxprune.z"}


def of_all(check, modules):
    """All modules in one test, since each takes no time; every failure is named."""
    wrong = []
    for module in modules:
        try:
            check(module)
        except AssertionError as error:
            wrong.append(str(error).partition("\n")[0])
    assert not wrong, "\n".join(wrong)


def test_a_check_of_all_modules_names_every_failure():
    def check(module):
        assert "t" in module, f"{module} has no t."

    of_all(check, ["tree", "tables"])
    with pytest.raises(AssertionError, match=r"^masks has no t\.\s*wide has no t\."):
        of_all(check, ["masks", "tree", "wide"])


def test_imports_go_down():
    of_all(imports_go_down, ROOMS_OF_ALL)


def imports_go_down(module):
    floor = FLOOR[room(module)]
    for other in ours(module):
        if other == "jaxprune":
            assert floor > 7, f"{module} imports the door, which imports {module}."
        elif room(other) != room(module):
            below = FLOOR[room(other)]
            assert below < floor, f"{module} (floor {floor}) imports {other} (floor {below}), which is not below it."


def test_imports_go_down_in_the_lab():
    of_all(imports_go_down_in_the_lab, [name for name in ROOMS_OF_ALL if name.startswith("jaxprune.lab.")])


def imports_go_down_in_the_lab(module):
    here = room(module, FLOOR_OF_LAB)
    for other in ours(module):
        if other.startswith("jaxprune.lab.") and room(other, FLOOR_OF_LAB) != here:
            floor, below = FLOOR_OF_LAB[here], FLOOR_OF_LAB[room(other, FLOOR_OF_LAB)]
            assert below < floor, f"{module} (floor {floor}) imports {other} (floor {below}), which is not below it."


def test_the_sparse_wing_does_not_know_the_pruners():
    of_all(knows_no_pruner, [name for name in ROOMS_OF_ALL if name.split(".")[1] in ("sparse", "storage")])


def knows_no_pruner(module):
    for other in ours(module):
        assert any(other == name or other.startswith(name + ".") for name in SPARSE_KNOWS), f"{module} imports {other}."


def test_libraries_are_known_where_they_belong():
    of_all(libraries_are_where_they_belong, MODULES)


def libraries_are_where_they_belong(module):
    wing = module.split(".")[1] if "." in module else ""
    if wing == "lab":
        return
    # A value of quax is an Equinox module: quax brings Equinox along.
    allowed = CORE | ({"equinox"} if wing == "sparse" else set())
    assert theirs(module) <= allowed, f"{module} imports {theirs(module) - allowed}."


def test_no_import_goes_in_circles():
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    graph = {name: (ours(name) & set(MODULES)) - packages for name in MODULES}
    assert set(TopologicalSorter(graph).static_order()) == set(MODULES)


def test_what_the_lab_needs_besides_is_what_the_command_line_names():
    needed = {name for module in MODULES if module.startswith("jaxprune.lab") for name in theirs(module)}
    assert needed - CORE - {"equinox"} <= OF_THE_LAB


def test_versions_of_jax_are_known_to_compat_alone():
    private = {module for module in MODULES if any(name.startswith("jax._src") for name in imports_of(module))}
    assert private == {"jaxprune.compat"}
    compared = re.compile(r"(jax|jaxlib|flax)\.__version\w*\s*[<>=(]|version_info\s*[<>=]")
    assert not [module for module, path in MODULES.items() if compared.search(path.read_text())]


def test_every_room_says_what_it_is_for():
    """And is a package: a folder without its `__init__`, left out by a pattern of `.gitignore`, is still imported."""
    for folder in {path.parent for path in MODULES.values()}:
        module = MODULES.get(module_name(folder / "__init__.py"))
        assert module, f"{folder} has no __init__.py."
        assert ast.get_docstring(ast.parse(module.read_text())), f"{module} says nothing."


def code_lines(function):
    """Of a function without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    said = function.body[0] if ast.get_docstring(function, clean=False) is not None else None
    return lines - (said.end_lineno - said.lineno + 1 if said else 0)


def test_lines_of_code_are_counted_without_docstrings():
    one, two = ast.parse('def f():\n  """a\n\n  b"""\n  return 1\ndef g():\n  x = 1\n  return x').body
    assert (code_lines(one), code_lines(two)) == (2, 3)


def test_files_functions_and_folders_are_small():
    """A file is read in one sitting, a function seen at one glance, a folder of the lab known by heart."""
    large = []
    for module, path in MODULES.items():
        text = path.read_text()
        large += [f"{module}: {lines} lines"] if (lines := len(text.splitlines())) > 350 else []
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        large += [f"{module}.{one.name}: {code_lines(one)} lines" for one in functions if code_lines(one) > 60]
    for folder in {path.parent for path in (PACKAGE / "lab").rglob("*.py")}:
        files = [path for path in folder.iterdir() if path.is_file()]
        large += [f"{folder.relative_to(PACKAGE)}: {len(files)} files"] if len(files) > 12 else []
    assert not large, "\n".join(large)
