"""The models: each a pure function of a pytree of arrays, and the shapes of that pytree.

| module | holds |
|---|---|
| `small` | MLP, LeNets and the CNN of the TensorFlow tutorial |
| `trainable` | what experiments train, by the name in a config |
| `own` | a model of the user's own, by MODULE:NAME |
| `vgg`, `resnet`, `mobilenet` | convolutional networks |
| `vit`, `decoder` | transformers for images and for text |
| `parts` | layers that they share, and random weights |
| `registry` | configurations by name |
| `zoo` | all of them with random weights |
| `pretrained` | published weights of ResNet-50, and images for it |
"""

from jaxprune.lab.models.small import MLP, ConvNet, Network, parameter_count
from jaxprune.lab.models.trainable import build, shapes

__all__ = ["MLP", "ConvNet", "Network", "build", "parameter_count", "shapes"]
