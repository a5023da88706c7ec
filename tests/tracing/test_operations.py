"""Operations that move indices: where each index comes from, against the operations themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.core import eval_jaxpr

from jaxprune.tracing.operations import MOVES, moves

FILLER = -5.0
CASES = {
    "slice": lambda x: lax.slice(x, (0, 1, 2), (2, 4, 7)),
    "strided slice": lambda x: lax.slice(x, (0, 0, 1), (2, 4, 7), (1, 3, 2)),
    "empty slice": lambda x: lax.slice(x, (0, 2, 0), (2, 2, 7)),
    "split": lambda x: lax.split(x, (1, 4, 2), axis=2),
    "tile": lambda x: lax.tile(x, (1, 3, 2)),
    "rev": lambda x: lax.rev(x, (0, 2)),
    "concatenate": lambda x: lax.concatenate([x, x[:, :1] + 100, x + 200], 1),
    "pad": lambda x: lax.pad(x, FILLER, ((0, 0, 0), (1, 2, 0), (0, 3, 0))),
    "pad between": lambda x: lax.pad(x, FILLER, ((0, 0, 2), (1, 0, 1), (0, 0, 0))),
    "pad by less than nothing": lambda x: lax.pad(x, FILLER, ((0, 0, 0), (-1, 2, 0), (-2, -1, 1))),
}


@pytest.mark.parametrize("case", CASES)
def test_indices_come_from_where_it_says(case):
    x = jnp.asarray(np.arange(2.0 * 4 * 7).reshape(2, 4, 7), jnp.float32)
    jaxpr = jax.make_jaxpr(CASES[case])(x)
    eqn = jaxpr.eqns[-1]
    assert eqn.primitive.name in MOVES
    given = eval_jaxpr(jaxpr.jaxpr.replace(outvars=eqn.invars[:3]), jaxpr.consts, x)
    operands = [np.asarray(one) for one in given if np.ndim(one) == 3]
    whole = operands[0] if len(operands) == 1 else np.concatenate(operands, 1)
    wanted = jax.tree.leaves(CASES[case](x))
    found = moves(eqn)
    assert len(found) == len(wanted)
    for each, want in zip(found, wanted, strict=True):
        result = whole
        for axis, sources in each.items():
            filler = np.full_like(result.take([0], axis), FILLER)
            result = np.concatenate([result, filler], axis).take(sources, axis)
        np.testing.assert_array_equal(result, np.asarray(want))
