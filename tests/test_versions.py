"""What must be the same on every jax that is supported: each version is held to the values that stand here.

One network of a stem, three equal layers and a head, scanned in three ways, with the same numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quax
from flax import linen, nnx
from jax.extend.core import Primitive
from sparse_helpers import needs_kernels

import jaxprune as jp
from jaxprune import sparse, storage
from jaxprune.compat import present_forms, primitive_name, scan_groups
from jaxprune.lab.models import zoo
from jaxprune.lab.models.parts import fold_batch_norms
from jaxprune.lab.models.resnet import ResNet50
from jaxprune.sparse.fuse import find_chains

LAYERS, IN, WIDTH, OUT, BATCH = 3, 6, 8, 4, 5
RNG = np.random.default_rng(21)
STEM = RNG.normal(size=(IN, WIDTH)).astype(np.float32)
STACK = RNG.normal(size=(LAYERS, WIDTH, WIDTH)).astype(np.float32)
BIAS = RNG.normal(size=(LAYERS, WIDTH)).astype(np.float32)
HEAD = RNG.normal(size=(WIDTH, OUT)).astype(np.float32)
X = RNG.normal(size=(BATCH, IN)).astype(np.float32)


def plain():
    def apply(params, x):
        def step(x, layer):
            return jax.nn.relu(x @ layer["kernel"] + layer["bias"]), None

        x = x @ params["stem"]["kernel"]
        return jax.lax.scan(step, x, params["layers"])[0] @ params["head"]["kernel"]

    layers = {"kernel": STACK, "bias": BIAS}
    return apply, {"stem": {"kernel": STEM}, "layers": layers, "head": {"kernel": HEAD}}


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        self.stem = nnx.Linear(IN, WIDTH, use_bias=False, rngs=rngs)
        self.layers = make(rngs.split(LAYERS))
        self.head = nnx.Linear(WIDTH, OUT, use_bias=False, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def scan(layer, x):
            return nnx.relu(layer(x))

        return self.head(scan(self.layers, self.stem(x)))


def in_nnx():
    graph, state = nnx.split(nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0))))
    pure = nnx.to_pure_dict(state)
    pure["layers"] |= {"kernel": STACK, "bias": BIAS}
    pure["stem"]["kernel"], pure["head"]["kernel"] = STEM, HEAD
    nnx.replace_by_pure_dict(state, pure)
    return lambda params, x: nnx.merge(graph, params)(x), state


class LinenLayer(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return linen.relu(linen.Dense(WIDTH)(x)), None


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        scan = linen.scan(LinenLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        x, _ = scan(name="layers")(linen.Dense(WIDTH, use_bias=False, name="stem")(x), None)
        return linen.Dense(OUT, use_bias=False, name="head")(x)


def in_linen():
    layers = {"Dense_0": {"kernel": STACK, "bias": BIAS}}
    params = {"stem": {"kernel": STEM}, "layers": layers, "head": {"kernel": HEAD}}
    return lambda params, x: LinenModel().apply({"params": params}, x), params


WAYS = {"plain": plain, "nnx": in_nnx, "linen": in_linen}


@pytest.fixture(params=list(WAYS))
def model(request, relaxed):
    apply, params = WAYS[request.param]()
    return apply, jax.tree.map(jnp.asarray, params)


def role(name):
    """What a leaf is, whatever its framework calls it."""
    return "bias" if "bias" in name else name.partition("/")[0]


def test_sites_and_costs(model):
    apply, params = model
    sites = jp.trace(apply, params, X)
    found = [(role(site.name), site.kind, site.macs, site.count) for site in sites]
    assert sorted(found) == [
        ("bias", "bias", 0, LAYERS),
        ("head", "product", BATCH * WIDTH * OUT, 1),
        ("layers", "product", LAYERS * BATCH * WIDTH * WIDTH, LAYERS),
        ("stem", "product", BATCH * IN * WIDTH, 1),
    ]
    total = jp.costs(sites).total
    assert (total.weights, total.macs) == (296, 1360)
    assert jp.tracing.peak_activations(apply, params, X) == 640


def test_couplings_and_compaction(model):
    apply, params = model
    couplings = jp.couplings(apply, params, X)
    assert couplings.barriers == ()
    method = jp.Method(granularity=jp.Channels(couplings), distribution=jp.Uniform())
    masks = jp.compute_masks(method, params, 0.25)
    small = jp.compact(apply, params, masks, X)
    shapes = {role(name): leaf.shape for name, leaf in jp.tree.named_leaves(small.params).items()}
    assert shapes == SMALLER
    want = apply(jp.apply_masks(params, masks), X)
    np.testing.assert_allclose(small.apply(small.params, X), want, rtol=1e-5, atol=1e-5)


def test_int8(model):
    apply, params = model
    ranges = storage.calibrate(apply, params, [X])
    assert {role(name): [tuple(np.round(one, 3)) for one in uses] for name, uses in ranges.items()} == RANGES
    got = jax.jit(storage.int8(apply, ranges))(params, X)
    np.testing.assert_allclose(got[0], INT8, rtol=1e-4)


SMALLER = {"stem": (6, 6), "layers": (3, 6, 6), "bias": (3, 6), "head": (6, 4)}
RANGES = {"stem": [(-1.116, 1.669)], "layers": [(-5.147, 11.093)], "head": [(0, 21.639)]}
INT8 = [-3.4679844, 2.1484337, -25.486841, 0.10004306]


def sparsely(like):
    leaf = np.zeros(like.shape, like.dtype)
    leaf[..., 0] = 1
    return jnp.asarray(leaf)


@needs_kernels
def test_chains_of_resnet50():
    """All 53 convolutions and the last product have a bias; 16 blocks add a residual; 49 ReLUs follow."""
    network = zoo.shapes("resnet50", 64)
    shapes = jax.eval_shape(lambda params: fold_batch_norms(params, ResNet50.epsilon), network.params)
    params = sparse.compress(jax.tree.map(sparsely, shapes), "native")
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    chains = find_chains(jax.make_jaxpr(quax.quaxify(network.apply))(params, x).jaxpr)
    assert len(chains) == 54
    assert sum(chain.residual is not None for chain in chains) == 16
    assert sum(chain.relu for chain in chains) == 49


def test_a_scans_operands_are_counted():
    def scan(w, x, layers):
        return jax.lax.scan(lambda x, layer: (x @ w + layer, x), x, layers)

    jaxpr = jax.make_jaxpr(scan)(jnp.ones((2, 2)), jnp.ones((3, 2)), jnp.ones((4, 3, 2)))
    assert scan_groups(jaxpr.jaxpr.eqns[-1]) == (1, 1)


COMING = ("jax_scan3", "jax_remat3", "jax_custom_jvp3", "jax_custom_vjp3")


@pytest.fixture(params=COMING)
def coming(request):
    """One of the flags for forms of control flow that are to come, alone."""
    if not hasattr(jax.config, request.param):
        pytest.skip(f"this jax has no {request.param}")
    before = {flag: getattr(jax.config, flag) for flag in COMING if hasattr(jax.config, flag)}
    for flag in before:
        jax.config.update(flag, flag == request.param)
    yield request.param
    for flag, value in before.items():
        jax.config.update(flag, value)


def names(fn, *args):
    return [primitive_name(eqn) for eqn in jax.make_jaxpr(fn)(*args).jaxpr.eqns]


def test_functions_are_traced_in_the_forms_of_today(coming):
    def fn(x):
        x = jax.checkpoint(jnp.sin)(jax.nn.relu(x))
        return jax.lax.scan(lambda x, _: (x + 1, x), x, None, length=3)

    with present_forms():
        today = names(fn, X)
    assert today == ["custom_jvp_call", "remat2" if "remat2" in today else "checkpoint", "scan"]
    assert (coming == "jax_custom_vjp3") == (names(fn, X) == today)
    assert getattr(jax.config, coming)


def double():
    """A function with a derivative of its own, defined under the flags that are set."""
    fn = jax.custom_vjp(lambda x: x * 2)
    fn.defvjp(lambda x: (x * 2, None), lambda _, dy: (dy * 2,))
    return fn


def test_the_coming_forms_work(coming):
    twice = jax.jit(double())

    def apply(params, x):
        def step(x, w):
            return jax.checkpoint(lambda x: jax.nn.relu(twice(x @ w["up"])))(x) @ w["down"], None

        return jax.lax.scan(step, x @ params["stem"], params["layers"])[0]

    layers = {"up": STACK, "down": np.swapaxes(STACK, 1, 2)}
    params = jax.tree.map(jnp.asarray, {"stem": STEM, "layers": layers})
    assert {(site.name, site.kind, site.count) for site in jp.trace(apply, params, X)} == {
        *(("layers/up", "product", 3), ("layers/down", "product", 3), ("stem", "product", 1))
    }
    couplings = jp.couplings(apply, params, X)
    unknown = {barrier.partition(" at")[0] for barrier in couplings.barriers}
    assert unknown <= {"CustomVJPTraced"}  # jax 0.10 decides when a function is decorated
    method = jp.Method(granularity=jp.Channels(couplings), distribution=jp.Uniform())
    masks = jp.compute_masks(method, params, 0.5)
    small = jp.compact(apply, params, masks, X)
    assert small.params["layers"]["up"].shape == ((3, 8, 4) if not unknown else (3, 8, 8))
    want = apply(jp.apply_masks(params, masks), X)
    np.testing.assert_allclose(small.apply(small.params, X), want, rtol=1e-5, atol=1e-5)
    pruned = jp.apply_masks(params, jp.compute_masks(jp.Method(), params, 0.5))
    compressed = sparse.compress(pruned, "bcsr", select=["stem"], layout=jp.FLAX)
    got = jax.jit(sparse.apply(apply))(compressed, X)
    np.testing.assert_allclose(got, apply(pruned, X), rtol=1e-5, atol=1e-5)


def test_an_unknown_primitive_is_a_barrier_with_its_name():
    p = Primitive("from_the_future")
    p.def_abstract_eval(lambda x: x)
    p.def_impl(lambda x: x)
    params = {"a": jnp.asarray(STEM), "b": jnp.asarray(STACK[0])}

    def apply(params, x):
        return p.bind(x @ params["a"]) @ params["b"]

    assert [site.kind for site in jp.trace(apply, params, X)] == ["product", "product"]
    couplings = jp.couplings(apply, params, X)
    assert [barrier.partition(" at")[0] for barrier in couplings.barriers] == ["from_the_future"]
    masks = jp.compute_masks(jp.Method(), params, 0.5)
    small = jp.compact(apply, params, masks, X)
    np.testing.assert_allclose(small.apply(small.params, X), apply(jp.apply_masks(params, masks), X), rtol=1e-6)
