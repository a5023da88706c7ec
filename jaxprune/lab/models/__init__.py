"""The models: each a pure function of a pytree of arrays, and the shapes of that pytree.

| module | holds |
|---|---|
| `small` | MLP, LeNets and the CNN of the TensorFlow tutorial |
| `own` | a model of the user's own, by MODULE:NAME |
| `vgg`, `resnet`, `mobilenet` | convolutional networks |
| `vit`, `decoder` | transformers for images and for text |
| `parts` | layers that they share, and random weights |
| `zoo` | all of them by name, with weights or with shapes alone |
| `pretrained` | published weights of ResNet-50, and images for it |
"""

from jaxprune.lab.models.parts import Network
from jaxprune.lab.models.small import MLP, ConvNet, parameter_count
from jaxprune.lab.models.zoo import build, shapes

__all__ = ["MLP", "ConvNet", "Network", "build", "parameter_count", "shapes"]
