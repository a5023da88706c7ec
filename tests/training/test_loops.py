"""`iterative_pruning`: rounds of pruning and training, rewinding to the bit, and a stop rule that says where."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

RNG = np.random.default_rng(5)
X = jnp.asarray(RNG.normal(size=(64, 12)), jnp.float32)
TRUE = jnp.asarray(np.where(np.arange(12)[:, None] < 4, RNG.normal(size=(12, 3)), 0), jnp.float32)  # 4 inputs matter
EARLY = {"w": jnp.asarray(RNG.normal(size=(12, 3)), jnp.float32)}
METHOD = jp.Method(distribution=jp.Uniform())


def loss(params):
    return jnp.mean((X @ params["w"] - X @ TRUE) ** 2)


def score(params):
    return -float(loss(params))


@jax.jit
def _train(params, masks):
    tx = optax.chain(optax.adam(0.05), jp.keep_params_sparse(masks))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), None, length=300)[0][0]


def trained(starts=None):
    def train(params, masks, number):
        if starts is not None:
            starts.append((number, params, masks))
        return _train(params, masks)

    return train


@pytest.fixture(scope="module")
def dense():
    with jax.numpy_dtype_promotion("standard"):
        return _train(EARLY, jax.tree.map(lambda leaf: jnp.ones_like(leaf, dtype=bool), EARLY))


pytestmark = pytest.mark.usefixtures("relaxed", "quick")
LEVELS = [0.25, 0.5, 2 / 3, 0.75, 11 / 12]  # 12 of 36 weights matter: 2/3 can go


def test_the_stop_rule_steps_back_to_the_last_good_state(dense):
    done = jp.iterative_pruning(METHOD, dense, LEVELS, trained(), evaluate=score, tolerance=1e-3)
    assert [one.number for one in done.rounds] == [1, 2, 3, 4]
    assert [round(one.sparsity, 6) for one in done.rounds] == [0.25, 0.5, 0.666667, 0.75]
    assert done.failed is done.rounds[-1]
    np.testing.assert_allclose(done.failed.shortfall, done.failed.needed - done.failed.score)
    assert done.failed.shortfall > 0
    assert f"round 4: 75 % removed, score {done.failed.score:.6g}: failed by {done.failed.shortfall:.3g}" in str(done)
    # The state is that of round 3, to the bit.
    again = jp.iterative_pruning(METHOD, dense, LEVELS[:3], trained(), evaluate=score, tolerance=1e-3)
    assert again.failed is None
    jax.tree.map(np.testing.assert_array_equal, (done.params, done.masks), (again.params, again.masks))
    assert int(jp.sparsity_of(done.masks) * 36 + 0.5) == 24
    assert score(done.params) == done.rounds[2].score


def test_a_threshold_is_raised_without_end_until_it_no_longer_recovers(dense):
    levels = (jp.distributions.SigmaThreshold(0.1 * k) for k in itertools.count(1))
    done = jp.iterative_pruning(METHOD, dense, levels, trained(), evaluate=score, tolerance=1e-3)
    assert done.failed is not None
    assert 0.5 <= float(jp.sparsity_of(done.masks)) <= 0.7
    assert all(not one.shortfall for one in done.rounds[:-1])


def test_a_first_round_that_fails_leaves_what_was_handed_in(dense):
    done = jp.iterative_pruning(METHOD, dense, [0.99], trained(), evaluate=score, tolerance=1e-3)
    assert len(done.rounds) == 1
    assert done.failed is not None
    jax.tree.map(np.testing.assert_array_equal, done.params, dense)
    assert bool(done.masks["w"].all())


def test_rewound_weights_are_the_early_ones_to_the_bit(dense):
    starts = []
    done = jp.iterative_pruning(METHOD, dense, [0.25, 0.5], trained(starts), early_params=EARLY)
    assert [number for number, *_ in starts] == [1, 2]
    for _, params, masks in starts:
        alive = np.asarray(masks["w"])
        np.testing.assert_array_equal(np.asarray(params["w"]).view("uint32")[alive],
                                      np.asarray(EARLY["w"]).view("uint32")[alive])  # fmt: skip
        assert not np.asarray(params["w"])[~alive].any()
    assert bool(jnp.all(starts[0][2]["w"] | ~starts[1][2]["w"]))  # the dead stay dead
    assert done.rounds[0].score is None
    assert done.failed is None


def test_groups_of_leaves_one_after_the_other():
    """The second call prunes its own leaf and leaves the first one's masks."""
    params = {"a": jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32), "b": EARLY["w"]}
    still = {"a": 0.5, "b": 0.75}
    masks = None
    for name, sparsity in still.items():
        method = jp.Method(distribution=jp.Uniform(), select=(name,))
        done = jp.iterative_pruning(method, params, [sparsity], lambda params, masks, number: params, masks=masks)
        params, masks = done.params, done.masks
        assert done.rounds[0].sparsity == sparsity
    for name, sparsity in still.items():
        assert float(jp.sparsity_of({name: masks[name]})) == sparsity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.1}, "needs `evaluate`"),
        ({"tolerance": -0.1, "evaluate": score}, "tolerance of 0 or more; got -0.1"),
        ({"levels": [0.5, 0.4]}, "must rise, got 0.4 after 0.5"),
        ({"levels": [50]}, "fraction"),
        ({"train": lambda params, masks, number: EARLY}, "dead weights of 'w' a value in round 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(dense, options, message):
    given = {"levels": [0.25], "train": lambda params, masks, number: params, **options}
    levels, train = given.pop("levels"), given.pop("train")
    with pytest.raises(ValueError, match=message):
        jp.iterative_pruning(METHOD, dense, levels, train, **given)
