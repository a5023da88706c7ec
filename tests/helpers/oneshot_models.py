"""Small models that the one-shot call is tried on, each with two batches of eight, and the products that they do.

MODELS["Linen scanned decoder"]()                a `Case`
products(case.apply, case.params, batch)         a list of `Done`
"""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import equinox_models
import framework_models
import jax
import jax.numpy as jnp
import linen_models
import numpy as np
from flax import linen, nnx

from jaxprune.compat import scan_groups
from jaxprune.lab.models.encoders import bert
from jaxprune.tracing.inlined import bind

VOCABULARY, LAYERS, DIM, HEADS, HIDDEN = 11, 2, 12, 3, 20


class Case(NamedTuple):
    """A model, its params, two batches.

    Of a scanned one also the same with its layers apart, with its params, and how these are stacked again.
    """

    apply: Any
    params: Any
    batches: list
    unrolled: Any = None
    apart: Any = None
    together: Any = None


def drawn(shapes, axis=-1):
    return framework_models.drawn(shapes, axis)


def texts(length=6):
    return [jnp.asarray(np.random.default_rng(i).integers(0, VOCABULARY, (8, length))) for i in range(2)]


def images(side, first=False):
    rng = np.random.default_rng(1)
    shape = (8, 3, side, side) if first else (8, side, side, 3)
    return [jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(2)]


def each(layers):
    """A stacked layer as a list."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(LAYERS)]


def stacked(layers):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


# ---------------------------------------------------------------- decoders


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.norm1, self.norm2 = nnx.RMSNorm(DIM, rngs=rngs), nnx.RMSNorm(DIM, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, DIM, use_bias=False, decode=False, rngs=rngs)
        self.gate, self.up, self.down = linear(DIM, HIDDEN), linear(DIM, HIDDEN), linear(HIDDEN, DIM)

    def __call__(self, x):
        causal = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + self.attention(self.norm1(x), mask=causal)
        y = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class NNXDecoder(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.norm = nnx.Embed(VOCABULARY, DIM, rngs=rngs), nnx.RMSNorm(DIM, rngs=rngs)
        self.blocks = nnx.vmap(NNXBlock, in_axes=0, out_axes=0)(rngs.split(LAYERS))

    def __call__(self, tokens):
        step = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.embed.attend(self.norm(step(self.embed(tokens), self.blocks)))


def nnx_decoder():
    model = NNXDecoder(nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    block = nnx.split(NNXBlock(nnx.Rngs(0)), nnx.Param)[0]

    def unrolled(params, tokens):
        table = params["embed"]["embedding"]
        x = table[tokens]
        for layer in params["blocks"]:
            x = nnx.merge(block, layer)(x)
        scale = params["norm"]["scale"][None, None]
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale
        return x @ table.T

    apart = {name: nnx.to_pure_dict(params[name]) for name in ("embed", "norm")} | {"blocks": each(params["blocks"])}
    together = lambda apart: {**apart, "blocks": stacked(apart["blocks"])}  # noqa: E731
    return Case(lambda params, x: nnx.merge(graph, params)(x), params, texts(), unrolled, apart, together)


class LinenStep(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return linen_models.DecoderBlock(HEADS, 1, HIDDEN)(x), None


class LinenDecoder(linen.Module):
    scanned: bool = True

    @linen.compact
    def __call__(self, tokens):
        embed = linen.Embed(VOCABULARY, DIM, name="embed")
        x = embed(tokens)
        if self.scanned:
            how = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": LAYERS}
            x, _ = linen.scan(linen.remat(LinenStep), **how)(name="layers")(x, None)
        else:
            for i in range(LAYERS):
                x, _ = LinenStep(name=f"layers_{i}")(x, None)
        return embed.attend(linen.RMSNorm(name="norm")(x))


def linen_decoder():
    batches = texts()
    params = drawn(jax.eval_shape(LinenDecoder().init, jax.random.key(0), batches[0]))
    plain = dict(params["params"])
    layers = {f"layers_{i}": layer for i, layer in enumerate(each(plain.pop("layers")))}

    def together(apart):
        ours = dict(apart["params"])
        return {"params": {"layers": stacked([ours.pop(name) for name in layers]), **ours}}

    apart = {"params": plain | layers}
    return Case(LinenDecoder().apply, params, batches, LinenDecoder(False).apply, apart, together)


# ---------------------------------------------------------------- others


def equinox_bert():
    config = bert.BertConfig(VOCABULARY, DIM, 1, HEADS, HIDDEN, length=8)
    params, rest = eqx.partition(bert.Bert(config, key=jax.random.key(0)), eqx.is_array)
    seen = jnp.asarray(np.arange(6) < np.array([[6], [5], [4], [6], [3], [6], [6], [5]]))
    apply = lambda params, batch: bert.sentence_vectors(eqx.combine(params, rest), *batch)  # noqa: E731
    return Case(apply, params, [(tokens, seen) for tokens in texts()])


def equinox_vit():
    make = functools.partial(equinox_models.ViT, **framework_models.TINY_VIT | {"heads": 3})
    params, apply, _ = framework_models.equinox_case(make, framework_models.image(8))
    return Case(apply, params, images(8, first=True))


def linen_resnet():
    module, batches = linen_models.ResNet((1, 1), width=4, classes=5), images(16)
    return Case(module.apply, drawn(jax.eval_shape(module.init, jax.random.key(0), batches[0])), batches)


MODELS = {
    "NNX scanned decoder": nnx_decoder,
    "Linen scanned decoder": linen_decoder,
    "Equinox BERT": equinox_bert,
    "Equinox ViT": equinox_vit,
    "Linen ResNet": linen_resnet,
}


# ---------------------------------------------------------------- an interpreter


class Done(NamedTuple):
    """A product or a convolution that was done: its operands in float64, and what it says of them."""

    name: str
    params: dict
    left: np.ndarray
    right: np.ndarray


def products(fn, *args):
    """Every product and convolution of a function, scans step by step, with the arrays that it met."""
    program, found = jax.make_jaxpr(fn)(*args), []
    _run(program.jaxpr, program.consts, jax.tree.leaves(args), found)
    return found


def _run(jaxpr, consts, args, found):
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        given = [known[atom] if isinstance(atom, jax.extend.core.Var) else atom.val for atom in eqn.invars]
        inner = next((eqn.params[word] for word in ("jaxpr", "call_jaxpr") if word in eqn.params), None)
        if eqn.primitive.name == "scan":
            results = _scan(eqn, given, found)
        elif inner is not None:
            results = _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), given, found)
        else:
            if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
                found.append(Done(eqn.primitive.name, eqn.params, *(np.asarray(x, np.float64) for x in given)))
            results = bind(eqn, given, eqn.params)
        known |= zip(eqn.outvars, results, strict=True)
    return [known[atom] if isinstance(atom, jax.extend.core.Var) else atom.val for atom in jaxpr.outvars]


def _scan(eqn, given, found):
    (consts, carried), body = scan_groups(eqn), eqn.params["jaxpr"]
    carry, stacks = given[consts : consts + carried], given[consts + carried :]
    made = []
    for i in range(eqn.params["length"]):
        results = _run(body.jaxpr, body.consts, [*given[:consts], *carry, *(x[i] for x in stacks)], found)
        carry = results[:carried]
        made.append(results[carried:])
    return [*carry, *(jnp.stack(column) for column in zip(*made, strict=True))]
