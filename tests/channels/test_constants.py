"""What a model computes whatever its inputs are: numbers that move, and loops that keep them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune.channels.constant_propagation import constants
from jaxprune.channels.constant_rules import nothing
from jaxprune.tracing.inlined import inlined

pytestmark = pytest.mark.usefixtures("quick")

ROW = np.float32([[1, 2, 3]])
FOUR = (1, 4)


def beside(x):
    """The numbers 1 2 3 beside one that is not known."""
    return jnp.concatenate([jnp.asarray(ROW), x[:, :1]], 1)


# A function of something unknown (1, 4) -> its result, None where it is not known.
CASES = {
    "beside": (beside, [1, 2, 3, None]),
    "sliced": (lambda x: beside(x)[:, 1:], [2, 3, None]),
    "backwards": (lambda x: beside(x)[:, ::-1], [None, 3, 2, 1]),
    "split": (lambda x: lax.split(beside(x), (1, 3), axis=1)[1], [2, 3, None]),
    "tiled": (lambda x: lax.tile(beside(x), (1, 2)), [1, 2, 3, None] * 2),
    "padded": (lambda x: lax.pad(beside(x), 7.0, ((0, 0, 0), (1, 0, 0))), [7, 1, 2, 3, None]),
    "padded between": (lambda x: lax.pad(beside(x), 7.0, ((0, 0, 0), (0, 0, 1))), [1, 7, 2, 7, 3, 7, None]),
    "padded by less than nothing": (lambda x: lax.pad(beside(x), 7.0, ((0, 0, 0), (-1, -1, 0))), [2, 3]),
    "padded with the unknown": (
        lambda x: lax.pad(beside(x), x[0, 0], ((0, 0, 0), (1, 0, 0))),
        [None, 1, 2, 3, None],
    ),
    "a loop that keeps all": (lambda x: lax.fori_loop(0, 3, lambda i, y: y * 1, beside(x)), [1, 2, 3, None]),
    "a loop until": (
        lambda x: lax.while_loop(
            lambda c: c[0] < x.sum(), lambda c: (c[0] + 1, c[1] * 1), (jnp.float32(0), beside(x))
        )[1],
        [1, 2, 3, None],
    ),
    "a loop that changes one": (
        lambda x: lax.while_loop(lambda y: y.sum() < x.sum(), lambda y: y + jnp.float32([[0, 1, 0, 0]]), beside(x)),
        [1, None, 3, None],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_known_where_they_are(case):
    fn, want = CASES[case]
    jaxpr = inlined(jax.make_jaxpr(fn)(jax.ShapeDtypeStruct(FOUR, np.float32)))
    found = constants(jaxpr, [nothing(aval) for aval in jaxpr.in_avals])[jaxpr.jaxpr.outvars[0]]
    shape = (1, len(want))
    value, known = (np.broadcast_to(part, shape)[0] for part in found)
    assert [float(v) if k else None for v, k in zip(value, known, strict=True)] == want
