"""The four answers can be listed: what a room has in `__all__` is typed and described, for others to be made of it.

Words of a config and its reference are such others: they ask the objects, no table is kept beside them.
"""

import dataclasses
import inspect
import re
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import jax.numpy as jnp
import pytest

import jaxprune as jp
from jaxprune import criteria, distributions, granularity, schedules

ROOMS = {"granularity": granularity, "distributions": distributions}
CLASSES = [(room, name) for room, module in ROOMS.items() for name in module.__all__]
PLAIN = {int, float, bool, str, type(None), granularity.Granularity, distributions.Distribution}


def described(doc, section):
    """Names in a section of a docstring."""
    body = re.search(rf"^{section}:\n((?:[ ]{{4}}.*\n|\n)+)", doc + "\n", re.MULTILINE)
    return re.findall(r"^    (\w+):", body[1], re.MULTILINE) if body else []


def atoms(hint):
    """What a type is made of: plain types, choices; `Any` and bare containers stay as they are."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {type(choice) for choice in inner}
    if origin in (Union, types.UnionType, tuple) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return set().union(*(atoms(one) for one in inner if one is not Ellipsis))
    return set().union(*map(atoms, inner)) if inner else {hint}


@pytest.mark.parametrize(("room", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_fields_are_typed_and_described(room, name):
    found = getattr(ROOMS[room], name)
    assert found.__dataclass_params__.frozen
    hints, fields = get_type_hints(found), [field.name for field in dataclasses.fields(found)]
    assert described(inspect.getdoc(found), "Attributes") == fields
    assert list(inspect.signature(found).parameters) == fields
    for field in fields:
        assert atoms(hints[field]) <= PLAIN, f"{name}.{field}: {hints[field]}"


def test_objects_say_themselves_what_they_look_at():
    """Of a stacked leaf that may be a convolution, and of a name that tells no axes; also objects of a user's own."""

    class Outputs(distributions.Uniform):
        spans_axes = True

    class Rows(granularity.Output):
        looks_at_axes = spans_axes = False

    stacked, unnamed = {"layers/kernel": jnp.ones((3, 4, 6))}, {"layers/x": jnp.ones((4, 6))}
    wide = (
        {"distribution": Outputs()},
        {"distribution": jp.distributions.ByRule({"*": Outputs()})},
        {"granularity": jp.Output()},
    )
    for answers in wide:
        with pytest.raises(ValueError, match="may be stacked layers"):
            jp.compute_masks(jp.Method(**answers), stacked, 0.5)
    for answers in ({"distribution": jp.NM(2, 4)}, {"granularity": granularity.Block(2, 2)}):
        jp.compute_masks(jp.Method(**answers), stacked, None if "distribution" in answers else 0.5)
        with pytest.raises(ValueError, match="does not tell which axis"):
            jp.compute_masks(jp.Method(**answers), unnamed, 0.5)
    jp.compute_masks(jp.Method(granularity=Rows()), stacked | unnamed, 0.5)


def test_a_type_that_says_nothing_is_seen():
    assert not atoms(Any) <= PLAIN
    assert not atoms(tuple[tuple[str, Any], ...]) <= PLAIN
    assert described("Two.\n\nAttributes:\n    a: one,\n        b: none.\n    c: two.\n", "Attributes") == ["a", "c"]


@pytest.mark.parametrize("module", [criteria, granularity, distributions, schedules], ids=lambda m: m.__name__)
def test_what_is_listed_is_all_there_is(module):
    assert len(set(module.__all__)) == len(module.__all__)
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", "").startswith(module.__name__)
    }
    none = {"AcrossLeaves", "Distribution", "Geometry", "Granularity", "Running", "Timed"}
    none |= {"as_schedule", "as_update_when", "expand_leaves", "granularities", "pool_leaves"}
    assert public - none == set(module.__all__)


def test_criteria_look_at_keywords_and_those_that_make_them_say_how():
    for name in criteria.__all__:
        found = getattr(criteria, name)
        if found in criteria.FACTORIES:
            assert criteria.FACTORIES[found].startswith(f"{name}(")
            continue
        score = found.score if isinstance(found, criteria.Running) else found
        params, *evidence = inspect.signature(score).parameters.values()
        assert params.kind is params.POSITIONAL_ONLY
        assert {one.kind for one in evidence} <= {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}


def test_ramps_have_the_arguments_of_one():
    assert {inspect.signature(ramp) for ramp in schedules.RAMPS} == {inspect.signature(schedules.cubic)}
    final = {name for name in schedules.__all__ if "final" in inspect.signature(getattr(schedules, name)).parameters}
    assert {ramp.__name__ for ramp in schedules.RAMPS} == final - {"rounds"}
