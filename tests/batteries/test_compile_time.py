"""What a step with `prune` costs to compile: no more than in proportion to the leaves, and little for each."""

import collections
import re
import time

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxprune as jp
from jaxprune.exact.ranking import fitting_masks, top_k_masks
from jaxprune.exact.wide import wide

# Of a transformer's block, made small: what compiles does not depend on sizes.
SHAPES = [(64, 64), (64, 256), (256, 64), (3, 3, 16, 16), (64, 128)]
DISTRIBUTIONS = {"Global": jp.Global(), "Uniform": jp.Uniform()}
CONTESTS = {
    "top_k_masks": lambda scores: top_k_masks(scores, 5),
    "fitting_masks": lambda scores: fitting_masks(scores, [1] * len(scores), wide(5)),
}


def loop_bodies(jaxpr):
    """Bodies of all loops, those within others too."""
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                if equation.primitive.name == "scan":
                    yield inner
                yield from loop_bodies(inner)


def operations(jaxpr):
    """How many equations of each primitive, those of inner functions too."""
    found = collections.Counter()
    for equation in jaxpr.eqns:
        found[equation.primitive.name] += 1
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found.update(operations(inner) if hasattr(inner, "eqns") else {})
    return found


def largest_body(contest, n):
    scores = [jax.ShapeDtypeStruct((1, 8, 64), jnp.float32)] * n
    bodies = [operations(body) for body in loop_bodies(jax.make_jaxpr(CONTESTS[contest])(scores).jaxpr)]
    assert len(bodies) == 2  # the threshold's loop, and that of its equals
    return max(bodies, key=lambda body: body.total())


@pytest.mark.parametrize("contest", CONTESTS)
def test_a_leaf_adds_two_reductions_and_little_else_to_a_loop(contest):
    few, many = largest_body(contest, 3), largest_body(contest, 6)
    assert many["reduce_sum"] - few["reduce_sum"] == 3 * 2  # in runs, then of all runs the three counts at once
    assert many.total() - few.total() <= 3 * 40


def kernels(text):
    """Different programs among those of a leaf's size: XLA:CPU compiles equal ones once."""
    found = set()
    for computation in text.split("\n\n"):
        head, _, body = computation.partition("{\n")
        if "fused_computation" in head and "[1,8,64]" in head:
            names = {}
            body = re.sub(r", metadata=\{.*?\}|to_apply=\S+", "", body)
            found.add(re.sub(r"%[\w.-]+", lambda name, names=names: names.setdefault(name[0], f"%{len(names)}"), body))
    return found


def test_leaves_of_one_shape_share_their_programs():
    def of(n):
        scores = [jax.ShapeDtypeStruct((1, 8, 64), jnp.float32)] * n
        return kernels(jax.jit(CONTESTS["top_k_masks"]).lower(scores).compile().as_text())

    assert 0 < len(of(6)) <= len(of(3))


def test_a_loop_is_no_single_function():
    """jaxlib 0.12 makes one of a loop without a sort, in time that grows with the square of the leaves."""
    scores = [jax.ShapeDtypeStruct((1, 8, 64), jnp.float32)] * 2
    for contest in CONTESTS.values():
        assert "xla_cpu_small_call" not in jax.jit(contest).lower(scores).compile().as_text()


def compile_seconds(distribution, n):
    params = {f"layer_{i:03}": {"kernel": jnp.ones(SHAPES[i % len(SHAPES)])} for i in range(n)}
    method = jp.Method(distribution=distribution)
    tx = jp.prune(optax.adam(1e-3), method, sparsity=jp.cubic(0.9, begin=0, end=1000), update_when=jp.every(100))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step).lower(params, tx.init(params), params)
    before = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - before


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_seconds_of_compiling_grow_with_the_leaves_alone(name):
    seconds = {n: compile_seconds(DISTRIBUTIONS[name], n) for n in (30, 60, 200)}
    assert seconds[60] <= 2.2 * seconds[30], seconds  # twice, within the noise of one run
    assert name != "Global" or seconds[200] <= 15, seconds
