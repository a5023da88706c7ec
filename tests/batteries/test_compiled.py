"""Programs compiled for a TPU and an H100 that are not here: the collectives expected and no others, no callback.

pytest -m slow tests/batteries/test_compiled.py      ten minutes for each plugin installed, see experiments/benchmarks

What is expected is experiments/benchmarks/compiled.json, which `compiled.py tpu cuda --write` fills in.
"""

import importlib.util
from pathlib import Path

import jax
import pytest

SCRIPT = Path(__file__).parents[2] / "experiments/benchmarks/compiled.py"
spec = importlib.util.spec_from_file_location("compiled", SCRIPT)
compiled = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compiled)

TARGETS = ["tpu", "cuda"]
EXPECTED = compiled.expected()

# The same program in two texts: a chain is one collective in several fusions, and what is started is done once.
TEXT = """
  %all-gather.1 = bf16[8] all-gather(%a), channel_id=9, frontend_attributes={chain_id="0"}
  %all-gather.2 = bf16[8] all-gather(%b), channel_id=9, frontend_attributes={chain_id="0"}
  %all-gather.3 = bf16[8] all-gather(%c), channel_id=9
  %all-gather.4 = bf16[8] all-gather(%c), channel_id=9
  %s = (f32[8], f32[8]) collective-permute-start(%d), channel_id=3
  %t = f32[8] collective-permute-done(%s)
  %u = f32[8] fusion(%t), kind=kLoop, calls=%all-reduce.9
  %v = f32[8] custom-call(%u), custom_call_target="Sharding"
  %w = (u32[3], s32[3]) sort(%v, %i), dimensions={0}
  %y = f32[64,128]{1,0:T(8,128)} sort(%v), dimensions={0}
"""


def test_collectives_are_counted_once():
    assert compiled.collectives(TEXT) == {"all-gather": 3, "collective-permute": 1}
    assert max(compiled.results(TEXT, compiled.COLLECTIVES)) == (32, 8)


def test_sorts_of_a_few_numbers_are_none():
    assert compiled.operations(TEXT) == {"sort": 1}


def test_differences_are_told():
    row = {"collectives": {"all-reduce": 6}, "calls": {"Sharding": 2}, "temporaries_mib": 100.0}
    assert compiled.differences(row, {**row, "temporaries_mib": 103.0, "calls": {"Sharding": 3}}) == []
    assert compiled.differences({**row, "calls": {}}, row) == ["calls: {}, expected {'Sharding': 2}"]
    assert compiled.differences({**row, "collectives": {"all-reduce": 6, "all-gather": 1}}, row) == [
        "collectives: {'all-reduce': 6, 'all-gather': 1}, expected {'all-reduce': 6}"
    ]
    assert compiled.differences({**row, "temporaries_mib": 120.0}, row) == ["temporaries_mib: 120.0, expected 100.0"]
    assert compiled.differences(row, {}) != []


@pytest.mark.parametrize("target", TARGETS)
def test_every_program_has_a_row(target):
    assert set(EXPECTED["rows"][target]) == set(compiled.programs(target))


@pytest.mark.parametrize("target", TARGETS)
def test_no_row_leaves_the_accelerator(target):
    """No callback and no transfer to the host; nothing is sorted, and a product of one chip needs no other."""
    for name, row in EXPECTED["rows"][target].items():
        if "fails" in row:
            continue
        assert row["host"] == {}
        if name.startswith(("masks", "step")):
            assert "sort" not in row["operations"]
        if name.startswith("sparse") or target == "cuda":
            assert row["collectives"] == {}


def test_the_table_can_be_read():
    assert compiled.markdown(EXPECTED).count("\n| ") == 2 + sum(map(len, EXPECTED["rows"].values()))


@pytest.fixture(scope="module")
def meshes():
    return {target: compiled.mesh_of(target) for target in TARGETS if not compiled.why_missing(target)}


@pytest.mark.slow
@pytest.mark.usefixtures("relaxed", "unchecked")  # as users have it, and shapes stand for arrays
@pytest.mark.parametrize(
    ("target", "name"), [(target, name) for target in TARGETS for name in compiled.programs(target)]
)
def test_compiled_programs_are_as_expected(meshes, target, name):
    if missing := compiled.why_missing(target):
        pytest.skip(missing)
    if EXPECTED["jax"] != jax.__version__:
        pytest.skip(f"what is expected was compiled by jax {EXPECTED['jax']}")
    found = compiled.row(meshes[target], compiled.programs(target)[name])
    assert compiled.differences(found, EXPECTED["rows"][target][name]) == []
