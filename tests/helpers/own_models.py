"""Models and data sets as a user would write them, by MODULE:NAME in configs; and some as they should not be."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Net(nnx.Module):
    """Convolution, batch norm with a momentum of its own, dropout."""

    def __init__(self, image, classes, rngs, width=8, rate=0.25):
        self.conv = nnx.Conv(image[-1], 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.7, rngs=rngs)
        self.fc1 = nnx.Linear(image[0] * image[1] * 4, width, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.fc2 = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.fc2(self.drop(nnx.relu(self.fc1(x.reshape(x.shape[0], -1)))))


def pair(image, classes, key, width=8, look_up=False):
    """A function's params and apply, with dropout by `key`; perhaps with a use that no compressed weight has."""
    first, second = jax.random.split(key)
    drawn = {"one": jax.random.normal(first, (image[0], width)), "two": jax.random.normal(second, (width, classes))}

    def apply(params, x, key=None):
        hidden = jax.nn.relu(x @ params["one"])
        hidden = hidden if key is None else hidden * jax.random.bernoulli(key, 0.75, hidden.shape)
        logits = hidden @ params["two"]
        return logits + jnp.expand_dims(params["one"][:classes, 0], 0) if look_up else logits

    return {name: 0.3 * leaf for name, leaf in drawn.items()}, apply


def samples(n=120, seed=0):
    """The brightest of three pixels is the class; labels, and images of 0 to 255 without channels."""
    rng = np.random.default_rng(seed)
    labels, images = rng.integers(0, 3, n), rng.integers(0, 80, (n, 8, 8), dtype=np.uint8)
    images[np.arange(n), 0, labels] += 150
    return images, labels


def pixels(n=120, data_dir=""):
    images, labels = samples(n)
    return (images[: n // 2], labels[: n // 2]), (images[n // 2 :], labels[n // 2 :])


def features(n=120):
    (x, y), (u, v) = pixels(n)
    return (x[:, 0] / 255, y), [u[:, 0] / 255, v]


STATE = {"seed": 0}


def moody():
    images, labels = samples(seed=STATE["seed"])
    return (images[:60], labels[:60]), (images[60:], labels[60:])


class OnlyRngs(nnx.Module):
    def __init__(self, rngs):
        pass


class FiveLogits(Net):
    def __init__(self, image, classes, rngs):
        super().__init__(image, 5, rngs)


class Constants(Net):
    def __init__(self, image, classes, rngs):
        super().__init__(image, classes, rngs)
        self.table = nnx.Variable(jnp.ones(3))


class WithFlag(Net):
    def __call__(self, x, train):
        return super().__call__(x)


class Linen:
    def __init__(self, image, classes, key):
        pass


def module(image, classes, key):
    return Net(image, classes, nnx.Rngs(key))


def integers(image, classes, key):
    return {"w": jnp.ones((image[0], classes), jnp.int32)}, lambda params, x: x @ params["w"]


def nothing(image, classes, key):
    return {}, lambda params, x: x


no_function = 3
ONES, LABELS = np.ones((4, 3)), np.array([0, 1, 0, 1])
BAD = {
    "one": ONES,
    "four": (ONES, LABELS, ONES, LABELS),
    "one_hot": ((ONES, np.eye(4, dtype=int)), (ONES, LABELS)),
    "float_labels": ((ONES, LABELS), (ONES, ONES[:, 0])),
    "negative": ((ONES, LABELS - 1), (ONES, LABELS)),
    "one_class": ((ONES, 0 * LABELS), (ONES, 0 * LABELS)),
    "integers": ((ONES.astype(int), LABELS), (ONES, LABELS)),
    "no_axis": ((ONES[:, 0], LABELS), (ONES, LABELS)),
    "nothing": ((ONES[:0], LABELS[:0]), (ONES, LABELS)),
    "other_shapes": ((ONES, LABELS), (ONES[:, :2], LABELS)),
    "other_dtypes": ((ONES, LABELS), (ONES.astype(np.uint8), LABELS)),
    "not_finite": ((ONES * np.inf, LABELS), (ONES, LABELS)),
    "too_few_labels": ((ONES, LABELS[:3]), (ONES, LABELS)),
}


def bad(kind):
    return BAD[kind]
