"""The models: each a pure function of a pytree of arrays, and the shapes of that pytree.

| module | holds |
|---|---|
| `small` | MLP, LeNets and the CNN of the TensorFlow tutorial, which the experiments train |
| `vgg`, `resnet`, `mobilenet` | convolutional networks |
| `vit`, `decoder` | transformers for images and for text |
| `parts` | layers that they share, and random weights |
| `zoo` | all of them by name |
| `pretrained` | published weights of ResNet-50, and images for it |
"""

from jaxprune.lab.models.small import MLP, ConvNet, Network, build, parameter_count

__all__ = ["MLP", "ConvNet", "Network", "build", "parameter_count"]
