"""Products as matrices: what meets a leaf, times the leaf's view, is what the product gave, however both lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from trace_helpers import normal

from jaxprune import tree
from jaxprune.layout import to_view
from jaxprune.tracing.features import inputs_of, layers_of, places, results_of, share_of
from jaxprune.tracing.finder import arrays_of, jaxpr_of
from jaxprune.tracing.products import Products

pytestmark = pytest.mark.usefixtures("quick")


def conv(x, w, layout=("NHWC", "HWIO", "NHWC"), **how):
    how = {"window_strides": (1, 1), "padding": "SAME"} | how
    return lax.conv_general_dilated(x, w, dimension_numbers=layout, **how)


def scanned(step, w, x):
    return lax.scan(lambda x, w: (step(x, w), None), x, w)[0]


CASES = {
    "matrix": (lambda w, x: x @ w, (5, 4), (3, 5)),
    "transposed": (lambda w, x: x @ w.T, (4, 5), (3, 5)),
    "weight first": (lambda w, x: w @ x, (4, 5), (5, 3)),
    "weight first, of three axes": (lambda w, x: jnp.einsum("ohi,bi->bho", w, x), (4, 2, 5), (3, 5)),
    "heads": (lambda w, x: jnp.einsum("bti,ihd->bthd", x, w), (6, 2, 3), (2, 4, 6)),
    "heads back": (lambda w, x: jnp.einsum("bthd,hdo->bto", x, w), (2, 3, 5), (2, 4, 2, 3)),
    "heads back, in another order": (lambda w, x: jnp.einsum("btdh,hdo->bto", x, w), (2, 3, 5), (2, 4, 3, 2)),
    "reshaped": (lambda w, x: x @ w.reshape(6, 4), (2, 3, 4), (5, 6)),
    "reshaped, moved": (lambda w, x: x @ w.transpose(1, 0, 2).reshape(6, 4), (2, 3, 4), (5, 6)),
    "flipped": (lambda w, x: x @ w[::-1], (5, 4), (3, 5)),
    "outputs cut": (lambda w, x: x @ w[:, 1:3], (5, 4), (3, 5)),
    "outputs cut, moved": (lambda w, x: (w.T[::-2] @ x.T).T, (5, 4), (3, 5)),
    "stack": (lambda w, x: jnp.einsum("lti,lio->lto", x, w), (3, 5, 4), (3, 2, 5)),
    "stack in the middle": (lambda w, x: jnp.einsum("tli,iol->tlo", x, w), (5, 4, 3), (2, 3, 5)),
    "one of a stack": (lambda w, x: x @ w[1], (3, 5, 4), (2, 5)),
    "vmapped inputs": (lambda w, x: jax.vmap(lambda x: x @ w)(x), (5, 4), (3, 2, 5)),
    "vmapped, weights too": (lambda w, x: jax.vmap(lambda w, x: x @ w)(w, x), (3, 5, 4), (3, 2, 5)),
    "repeated for a batch": (
        lambda w, x: jnp.einsum("bti,bio->bto", x, jnp.broadcast_to(w[None], (3, *w.shape))), (5, 4), (3, 2, 5)),
    "scan": (lambda w, x: scanned(lambda x, w: jnp.tanh(x @ w), w, x), (3, 4, 4), (2, 4)),
    "scan, backwards": (
        lambda w, x: lax.scan(lambda x, w: (x @ w, None), x, w, reverse=True)[0], (3, 4, 4), (2, 4)),
    "scan in a scan": (
        lambda w, x: scanned(lambda x, w: scanned(lambda x, w: x @ w, w, x), w, x), (2, 3, 4, 4), (2, 4)),
    "scan of experts": (
        lambda w, x: scanned(lambda x, w: jnp.einsum("eti,eio->eto", x, w), w, x), (2, 3, 4, 4), (3, 5, 4)),
    "scan along the second axis": (
        lambda w, x: scanned(lambda x, w: x @ w, jnp.moveaxis(w, 1, 0), x), (4, 3, 4), (2, 4)),
    "bfloat16": (lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), (5, 4), (3, 5)),
    "convolution": (lambda w, x: conv(x, w), (3, 3, 2, 4), (2, 5, 6, 2)),
    "convolution, strides": (
        lambda w, x: conv(x, w, window_strides=(2, 1), padding=[(0, 1), (2, 0)]), (3, 2, 2, 4), (2, 5, 6, 2)),
    "convolution, holes": (lambda w, x: conv(x, w, rhs_dilation=(2, 1)), (3, 3, 2, 4), (2, 7, 6, 2)),
    "convolution, cut": (lambda w, x: conv(x, w, padding=[(-1, 0), (0, -1)]), (2, 2, 2, 4), (2, 5, 6, 2)),
    "convolution, transposed": (
        lambda w, x: conv(x, w, lhs_dilation=(2, 2), padding=[(1, 2), (2, 0)]), (3, 3, 2, 4), (2, 3, 4, 2)),
    "convolution, flipped": (lambda w, x: lax.conv_transpose(x, w, (2, 2), "SAME"), (3, 3, 2, 4), (2, 3, 4, 2)),
    "convolution, OIHW": (lambda w, x: conv(x, w, ("NCHW", "OIHW", "NCHW")), (4, 2, 3, 3), (2, 2, 5, 6)),
    "convolution, one axis": (
        lambda w, x: conv(x, w, ("NWC", "WIO", "NWC"), window_strides=(1,)), (3, 2, 4), (2, 5, 2)),
    "scan of convolutions": (lambda w, x: scanned(conv, w, x), (2, 3, 3, 2, 2), (1, 4, 4, 2)),
}  # fmt: skip


def followed(apply, params, x, do):
    apply_fn = lambda params, x: apply(params["w"], x)  # noqa: E731
    program = Products(jaxpr_of(apply_fn, params, x), params, set(tree.named_leaves(params)), do)
    return program.run(arrays_of((params, (x,), {}))[0], jnp.float32(0))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inputs_times_the_view_are_the_result(case):
    apply, shape, x_shape = CASES[case]
    params, x = {"w": normal(*shape)}, normal(*x_shape, seed=1)
    sites = []

    def do(product, largest):
        site, y = product.site, product.plain()
        sites.append(site)
        view = to_view(params["w"], places(site).axes)
        matrices = view.reshape(-1, view.shape[-3] * view.shape[-2], view.shape[-1])[layers_of(product)]
        rows = inputs_of(product)
        assert rows.dtype == jnp.float32
        expected = jnp.einsum("lti,lio->lto", rows, matrices, precision="highest")
        found = results_of(site, product.weight.ndim, y)
        wrong = jnp.abs(expected[..., places(site).outputs] - found) / (1 + jnp.abs(found))
        return jnp.maximum(largest, jnp.max(wrong)), y

    largest, _ = followed(apply, params, x, do)
    assert float(largest) < (0.05 if case == "bfloat16" else 1e-5)
    assert share_of(sites[0]) == (0.5 if "outputs cut" in case else 1)


REFUSED = {
    "2 inputs, the leaf has 5": (lambda w, x: x[:, :2] @ w[:2], (5, 4), (3, 5)),
    "10 inputs, the leaf has 5": (lambda w, x: jnp.concatenate([x, x], 1) @ jnp.tile(w, (2, 1)), (5, 4), (3, 5)),
    "in 2 groups": (lambda w, x: conv(x, w, feature_group_count=2), (3, 3, 1, 4), (2, 5, 6, 2)),
    "split between inputs and outputs": (lambda w, x: x @ w.reshape(6, 4), (24,), (3, 6)),
    "left operand of a convolution": (lambda w, x: conv(w, x), (2, 5, 6, 2), (3, 3, 2, 4)),
    "by an index": (lambda w, x: lax.fori_loop(0, 3, lambda i, x: x @ w[i], x), (3, 4, 4), (2, 4)),
    "more than once": (
        lambda w, x: jnp.einsum("lti,lio->lto", x, jnp.tile(w, (2, 1, 1))), (2, 5, 4), (4, 3, 5)),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED, ids=str)
def test_what_has_no_such_matrix_is_refused_by_name(why):
    apply, shape, x_shape = REFUSED[why]
    with pytest.raises(ValueError, match=rf"'w'.*{why}.*`select`"):
        followed(apply, {"w": normal(*shape)}, normal(*x_shape), lambda product, s: (s, inputs_of(product)))


def test_a_number_for_each_step_of_a_loop():
    """Steps of the scans that take a leaf apart, the outermost first; of scans that do not, none."""
    w, x = normal(2, 3, 4, 4), normal(2, 4)
    seen = np.zeros((2, 3), int)

    def do(product, state):
        jax.debug.callback(lambda i, j: seen.__setitem__((int(i), int(j)), seen[int(i), int(j)] + 1), *product.layer)
        return state, product.plain()

    def apply(w, x):
        again = lambda x, _: (scanned(lambda x, w: scanned(lambda x, w: x @ w, w, x), w, x), None)  # noqa: E731
        return lax.scan(again, x, None, length=5)[0]

    followed(apply, {"w": w}, x, do)
    jax.effects_barrier()
    np.testing.assert_array_equal(seen, np.full((2, 3), 5))
