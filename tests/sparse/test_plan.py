"""Plans: plain data, followed by `compress`, refused by name when broken."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from sparse_helpers import sparse_leaves
from tune_helpers import PARAMS, X, install_clock, mlp, tune

from jaxprune import sparse
from jaxprune.sparse.tuning import plan, records


@pytest.fixture
def clock(monkeypatch):
    return functools.partial(install_clock, monkeypatch)


# ---------------------------------------------------------------- compress


def test_compress_follows_a_plan(clock):
    clock(bcsr=0.1, planned=0.5)
    chosen = tune(select=["a/kernel"])
    compressed = sparse.compress(PARAMS, chosen)
    (weight,) = sparse_leaves(compressed)
    assert (weight.name, type(weight)) == ("a/kernel", sparse.BCSRWeight)
    np.testing.assert_allclose(sparse.apply(mlp)(compressed, X), mlp(PARAMS, X), rtol=1e-5, atol=1e-6)


def test_a_plan_for_other_params_is_refused(clock):
    clock(bcsr=0.1, planned=0.5)
    chosen = tune()
    with pytest.raises(ValueError, match=r"leaves that the params do not have: 'b/kernel'"):
        sparse.compress({"a": PARAMS["a"]}, chosen)
    with pytest.raises(ValueError, match=r"other shapes of 'b/kernel' \(planned \(48, 16\), here \(2, 2\)\)"):
        sparse.compress(PARAMS | {"b": {"kernel": jnp.ones((2, 2))}}, chosen)


def test_an_all_dense_plan_compresses_nothing(clock):
    clock(dense=0.1)
    assert sparse_leaves(sparse.compress(PARAMS, tune())) == []


# ---------------------------------------------------------------- plain data


def test_json_round_trip(clock):
    clock(dense=1 / 3, bcsr=0.1, planned=0.2)
    chosen = tune(formats=None)
    again = sparse.Plan.from_json(chosen.to_json())
    assert again == chosen
    assert again.to_json() == chosen.to_json()
    assert set(chosen.machine) >= {"processor", "cores", "platform", "device", "jax", "jaxlib", "python", "native"}


def broken_plans():
    def without(field):
        return lambda plain: plain.pop(field)

    yield "version 7 arrived", lambda plain: plain.update(version=7)
    yield "version None arrived", without("version")
    yield "^machine is missing", without("machine")
    yield "leaves/0/nse is missing", lambda plain: plain["leaves"][0].pop("nse")
    yield r"leaves/0/shape/1 should be an integer, 'x'", lambda plain: plain["leaves"][0]["shape"].__setitem__(1, "x")
    yield "leaves/1/sparsity should be a number, None", lambda plain: plain["leaves"][1].update(sparsity=None)
    yield "leaves/0/sites should be a list", lambda plain: plain["leaves"][0].update(sites=3)
    yield "leaves/0/colour is no field", lambda plain: plain["leaves"][0].update(colour=1)
    yield r"'a/kernel' has the format 'csc'\. There are: 'bcoo'", lambda plain: plain["leaves"][0].update(format="csc")
    yield "leaves/0 should be an object", lambda plain: plain["leaves"].__setitem__(0, 1)


@pytest.mark.parametrize(("message", "break_it"), list(broken_plans()))
def test_broken_plans_are_refused_by_name(clock, message, break_it):
    clock(bcsr=0.1, planned=0.2)
    plain = json.loads(tune().to_json())
    break_it(plain)
    with pytest.raises(ValueError, match=message):
        sparse.Plan.from_json(json.dumps(plain))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match="plan"):
        sparse.Plan.from_json(text)


def test_a_plan_prints_as_a_table(clock, capsys):
    clock(bcsr=0.1, planned=0.2)
    text = str(tune())
    lines = text.splitlines()
    assert lines[0].split()[:4] == ["leaf", "shape", "sparsity", "format"]
    assert lines[1].split()[:6] == ["a/kernel", "32", "x", "48", "79.6%", "bcsr"]
    assert "times faster" in lines[-1]
    assert capsys.readouterr() == ("", "")


def test_records_take_a_whole_number_for_a_number():
    text = records.to_plain(plan.Timing("dense", 1, 1, 1, 3))
    assert records.from_plain(plan.Timing, text) == plan.Timing("dense", 1.0, 1.0, 1.0, 3)
