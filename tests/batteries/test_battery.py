"""The battery: every preset, and every answer that none has, through everything that masks must survive.

A preset that is added to `jaxprune.training.presets` is in here by that, and so is a criterion, a granularity or a
distribution that its room shows: the words of a config are read.
"""

import dataclasses
import inspect
from typing import get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from quick import quick_jit

import jaxprune as jp
from jaxprune.granularity import granularities
from jaxprune.lab.checkpoints import checkpoint
from jaxprune.lab.recipe import words

SHAPES = {"conv": (2, 2, 8, 4), "dense": (24, 16), "stack": (2, 8, 4), "bias": (16,)}
LAYOUT = jp.FLAX.with_rules({"stack": jp.layout.Axes(layers=(0,), inputs=(1,), outputs=(2,))})
OUTPUTS = {"conv": (4,), "dense": (16,), "stack": (2, 4)}
INPUTS = {"conv": (8,), "dense": (24,), "stack": (2, 8)}
LEAVES = ("conv", "dense", "stack")


def drawn(seed, shapes=SHAPES, dtype="float32"):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def positive(seed, shapes):
    return {name: jnp.abs(one) for name, one in drawn(seed, shapes).items()}


EVIDENCE = {
    "grads": drawn(1),
    "key": jax.random.key(0),
    "scales": drawn(2, OUTPUTS),
    "hessian_grads": drawn(3),
    "flow_grads": drawn(4),
    "squared_grads": positive(5, SHAPES),
    "input_norms": positive(6, INPUTS),
    "output_means": drawn(7, OUTPUTS),
    "zero_fractions": {name: one % 1 for name, one in positive(8, OUTPUTS).items()},
    "statistics": drawn(9),
}
PRESETS = {
    name: dataclasses.replace(preset, method=dataclasses.replace(preset.method, layout=LAYOUT))
    for name, preset in jp.presets().items()
}
RULES = {
    jp.granularity.ByRule: (("conv", jp.Kernel()), ("*", jp.Block(2, 2))),
    jp.distributions.ByRule: (("conv", jp.Uniform()), ("*", jp.PerOutput())),
    jp.distributions.BySensitivity: (("conv", ((0.5, 0.0), (0.99, 0.2))), ("*", ((0.95, 0.1),))),
}


def example(kind, name):
    """One of what a word stands for; what it must be given is 2, or a half."""
    found = words.known(kind, name)
    if kind == "criterion":
        return words.criterion(name, jp.Output())
    needed = [one.name for one in inspect.signature(found).parameters.values() if one.default is one.empty]
    hints = get_type_hints(found)
    return found(**{key: RULES.get(found, 0.5 if hints[key] is float else 2) for key in needed})


USED = [answer for preset in PRESETS.values() for answer in vars(preset.method).values()]
KINDS = [type(answer) for answer in USED]
ALONE = {}
for kind in ("criterion", "granularity", "distribution"):
    for word, one in words.REGISTRY[kind].items():
        if one not in (
            *USED,
            *KINDS,
            jp.Channels,
            jp.criteria.joint_taylor,
        ):  # channels are of a model, and have tests there
            groups = {"granularity": jp.Output()} if one is jp.criteria.activation_mean else {}
            label = word if word not in ALONE else f"{word}_{kind}"
            ALONE[label] = jp.Method(**{kind: example(kind, word)} | groups, layout=LAYOUT)

METHODS = {}
for label, found in {**{name: preset.method for name, preset in PRESETS.items()}, **ALONE}.items():
    if found not in METHODS.values():  # several presets differ in what goes on around them alone
        METHODS[label] = found

each = pytest.mark.parametrize("name", METHODS)


def kept_groups(masks, method):
    """Of every leaf: which groups are alive."""
    kept = {name: np.asarray(masks[name]) for name in LEAVES}
    if isinstance(method.granularity, jp.Element):
        return kept
    if isinstance(method.granularity, jp.Output):
        axes = {"conv": (0, 1, 2), "dense": (0,), "stack": (1,)}
        return {name: mask.any(axes[name]) for name, mask in kept.items()}
    views = {"conv": kept["conv"].reshape(4, 8, 4), "dense": kept["dense"][None], "stack": kept["stack"][:, None]}
    pools = granularities(method.granularity, views)
    return {name: np.asarray(pools[name].pool(jnp.float32(mask))) > 0 for name, mask in views.items()}


def contests(method, shape, name):
    """How many groups compete in each contest of a leaf."""
    size, distribution = int(np.prod(shape)), method.distribution
    if isinstance(distribution, jp.PerOutput) or getattr(distribution, "per_output", False):
        outputs = np.prod(OUTPUTS[name])
        return [size // outputs] * int(outputs)
    if isinstance(distribution, jp.NM):
        return [distribution.m] * (size // distribution.m)
    return [size // 2] * 2 if name == "stack" else [size]


def assert_count(masks, method, sparsity):
    """Exactly round(n s) of every contest; where leaves have sparsities of their own, of all together nearly."""
    kept, distribution = kept_groups(masks, method), method.distribution
    gone = {name: int((~one).sum()) for name, one in kept.items()}
    total = sum(one.size for one in kept.values())
    if isinstance(distribution, jp.Global):
        assert sum(gone.values()) == round(total * sparsity)
    elif isinstance(distribution, jp.ERK):
        assert abs(sum(gone.values()) - total * sparsity) <= len(LEAVES) * 2
    elif isinstance(distribution, jp.OWL):
        assert abs(sum(gone.values()) - total * sparsity) <= sum(np.prod(one) for one in OUTPUTS.values())
    elif isinstance(distribution, jp.distributions.Budget):
        assert sum(gone.values()) == total - int(total * (1 - sparsity) + 1e-3)
    elif isinstance(distribution, jp.Uniform | jp.PerOutput | jp.NM):
        for name, one in kept.items():
            most = 1 - distribution.n / distribution.m if isinstance(distribution, jp.NM) else 1
            want = sum(round(n * min(sparsity, most)) for n in contests(method, one.shape, name))
            assert gone[name] == want, name


def shares(method):
    """Sparsities to try: those that the distribution can be asked for."""
    only = {jp.distributions.SigmaThreshold: (None,), jp.distributions.Threshold: (None,), jp.NM: (0.25, 0.5)}
    return only.get(type(method.distribution), (0.0, 0.3, 0.9))


@each
def test_exact_counts_in_one_trace(name):
    """Structure, round(n s) groups, jit like eager, and a sparsity that moves without another trace.

    Of a model of two dtypes; of float32 alone the others are.
    """
    method, params, traces = METHODS[name], drawn(0), []
    params |= drawn(0, {leaf: SHAPES[leaf] for leaf in ("dense", "bias")}, "bfloat16")

    @jax.jit
    def run(params, sparsity, evidence):
        traces.append(1)
        return jp.compute_masks(method, params, sparsity, **evidence)

    for sparsity in shares(method):
        masks = run(params, None if sparsity is None else jnp.float32(sparsity), EVIDENCE)
        for leaf, weights in params.items():
            assert (masks[leaf].shape, masks[leaf].dtype) == (weights.shape, bool)
        assert_count(masks, method, sparsity)
        assert masks["bias"].all()
    eager = jp.compute_masks(method, params, None if sparsity is None else jnp.float32(sparsity), **EVIDENCE)
    jax.tree.map(np.testing.assert_array_equal, masks, eager)
    assert len(traces) == 1


@each
def test_vmap_and_scan_give_the_masks_of_one_by_one(name):
    method, sparsity = METHODS[name], shares(METHODS[name])[-1]
    models = [drawn(seed) for seed in (20, 21, 22)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)

    def run(params):
        return jp.compute_masks(method, params, sparsity, **EVIDENCE)

    @jax.jit
    def both(stacked):
        return jax.vmap(run)(stacked), jax.lax.scan(lambda _, params: (None, run(params)), None, stacked)[1]

    mapped, scanned = both(stacked)
    for i, params in enumerate(models):
        for leaf, want in run(params).items():
            np.testing.assert_array_equal(mapped[leaf][i], want)
            np.testing.assert_array_equal(scanned[leaf][i], want)


SPECS = (PartitionSpec("x", "y"), PartitionSpec(None, "x"), PartitionSpec("x", None))


@each
def test_eight_devices_make_the_masks_of_one(name):
    method, params = METHODS[name], drawn(0)
    sparsity = shares(method)[-1]
    want = jp.compute_masks(method, params, sparsity, **EVIDENCE)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    spec = SPECS[list(METHODS).index(name) % len(SPECS)]
    specs = {leaf: PartitionSpec(*[None] * (len(shape) - 2), *spec) for leaf, shape in SHAPES.items()}
    specs["bias"] = PartitionSpec("x")
    sharded = {leaf: jax.device_put(one, NamedSharding(mesh, specs[leaf])) for leaf, one in params.items()}
    masks = jax.jit(lambda p: jp.compute_masks(method, p, sparsity, **EVIDENCE))(sharded)
    for leaf in SHAPES:
        np.testing.assert_array_equal(masks[leaf], want[leaf], err_msg=f"{leaf} {spec}")


@each
def test_stacked_layers_score_like_single_ones(name):
    """What a criterion says of a stacked leaf is what it says of its layers, the rest of the model being the same."""
    criterion = METHODS[name].criterion
    if criterion is jp.criteria.random:
        pytest.skip("random numbers go by leaf")
    views = {"stack": drawn(0)["stack"][:, None], "dense": drawn(0)["dense"][None]}

    def viewed(one, leaf):
        full = one[leaf].shape == SHAPES[leaf]
        return (one[leaf][:, None] if leaf == "stack" else one[leaf][None]) if full else one[leaf]

    evidence = {
        key: {leaf: viewed(one, leaf) for leaf in views} if isinstance(one, dict) else one
        for key, one in EVIDENCE.items()
    }
    whole = criterion(views, **evidence)["stack"]
    single = {"0": views["stack"][0], "1": views["stack"][1], "dense": views["dense"]}
    apart = {
        key: {"0": one["stack"][0], "1": one["stack"][1], "dense": one["dense"]} if isinstance(one, dict) else one
        for key, one in evidence.items()
    }
    found = criterion(single, **apart)
    np.testing.assert_allclose(whole[0], found["0"], rtol=1e-6)
    np.testing.assert_allclose(whole[1], found["1"], rtol=1e-6)


# ---------------------------------------------------------------- as training goes on

AROUND = {name: preset for name, preset in PRESETS.items() if preset.how != "one-shot"}
STEPS = 8


def bits_of(tree):
    leaves = [jax.random.key_data(one) if jnp.issubdtype(one.dtype, jax.dtypes.prng_key) else one
              for one in jax.tree.leaves(tree)]  # fmt: skip
    return [np.asarray(one).tobytes() for one in leaves]


@pytest.mark.parametrize("name", AROUND)
def test_training_with_a_preset(tmp_path, relaxed, name):
    """One compiled step: zeros after every update, the count at the end, a scan like a loop, a checkpoint's bits."""
    preset = AROUND[name]
    sparsity = 0.5 if isinstance(preset.method.distribution, jp.NM) else 0.8
    tx = preset.optimizer(optax.adam(0.05), sparsity=sparsity, steps=STEPS, every=2, rounds=4, key=jax.random.key(1))
    evidence = {key: EVIDENCE[key] for key in ("squared_grads",)}
    grads = jax.tree.map(lambda *all_: jnp.stack(all_), *[drawn(seed) for seed in range(STEPS)])
    params = drawn(0)
    state = tx.init(params)

    def step(carry, grad):
        updates, state = tx.update(grad, carry[1], carry[0], **evidence)
        carry = (optax.apply_updates(carry[0], updates), state)
        return carry, optax.tree.get(state, "masks")

    scan, jitted = quick_jit(lambda carry, grads: jax.lax.scan(step, carry, grads)), quick_jit(step)
    half = [jax.tree.map(lambda leaf, part=part: leaf[part], grads) for part in (slice(0, 4), slice(4, 8))]
    middle, _ = scan((params, state), half[0])
    end, masks = scan(middle, half[1])
    carry = (params, state)
    for i in range(STEPS):
        carry, mask = jitted(carry, jax.tree.map(lambda leaf, i=i: leaf[i], grads))
        for leaf, alive in mask.items():
            assert not np.asarray(carry[0][leaf])[~np.asarray(alive)].view("uint32").any(), (i, leaf)
    last = {leaf: one[-1] for leaf, one in masks.items()}
    assert_count(last, preset.method, sparsity)
    jax.tree.map(np.testing.assert_array_equal, last, mask)
    checkpoint.save(tmp_path / "run", 4, middle, {}, keep=1)
    taken_up = checkpoint.restore_latest(tmp_path / "run", middle)[0].state
    assert bits_of(taken_up) == bits_of(middle)
    assert bits_of(scan(taken_up, half[1])[0]) == bits_of(end)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("magnitude_gradual", {"steps": 0}, "got 0, 2, 5"),
        ("acdc", {"steps": 2}, "Phases of 2 steps do not fit into 2 steps"),
        ("rigl", {"key": None}, "hand in a `key`"),
        ("snip", {}, "no optimizer"),
    ],
)
def test_presets_that_cannot_train_say_why(name, given, message):
    given = {"sparsity": 0.5, "steps": STEPS, "every": 2, "key": jax.random.key(0)} | given
    with pytest.raises(ValueError, match=message):
        PRESETS[name].optimizer(optax.adam(0.05), **given)
