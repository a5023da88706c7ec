"""The models that are measured, by name: those of `jaxprune.lab.models.zoo` as they are deployed, with random weights.

    network = build("resnet50", key)
    logits = network.apply(network.params, images)      # images (batch, *network.sample.shape)

Speed depends on shapes and on where the zeros are, not on the values, so nothing is downloaded and nothing trained.
"""

import difflib

from jaxtyping import Array, Key

from jaxprune.lab.models import zoo
from jaxprune.lab.models.parts import fold_batch_norms
from jaxprune.lab.models.resnet import ResNet50

NAMES = ("resnet50", "vgg19", *zoo.MNIST)


def build(name: str, key: Key[Array, ""], side: int | None = None) -> zoo.Network:
    """A model of the list, batch norms folded into the convolutions before them.

    Args:
        name: one of `NAMES`.
        key: draws the weights.
        side: height and width of the images; without it 224 for ImageNet's models, 28 for MNIST's.

    Raises:
        ValueError: an unknown name, or images too small for the model.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no model {name!r} to measure. There are: {', '.join(NAMES)}.{hint}")
    network = zoo.build(name, key, side)
    if name != "resnet50":
        return network
    return network._replace(params=fold_batch_norms(network.params, ResNet50.epsilon))
