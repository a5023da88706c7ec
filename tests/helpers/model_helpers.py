"""Every model of the lab, small enough to compile in a second."""

from jaxprune.lab.models.decoder import Decoder
from jaxprune.lab.models.mobilenet import MobileNetV1
from jaxprune.lab.models.resnet import CifarResNet, ResNet50
from jaxprune.lab.models.vgg import VGG
from jaxprune.lab.models.vit import ViT

SMALL = (8, 8, 3)
TEXT = {"vocabulary": 11, "dim": 16, "layers": 2, "heads": 4, "hidden": 24, "length": 6}
TINY = {
    "vgg": VGG((1, 2), (4, 6), hidden=12, classes=5, image=SMALL),
    "resnet for cifar": CifarResNet(1, width=4, classes=5, image=SMALL),
    "resnet50": ResNet50((1, 2), width=4, classes=5, image=SMALL),
    "resnet50 v1": ResNet50((1, 2), width=4, classes=5, image=SMALL, stride_first=True),
    "mobilenet": MobileNetV1(((6, 1), (8, 2), (8, 1)), stem=4, classes=5, image=SMALL),
    "vit": ViT(dim=12, layers=2, heads=3, hidden=20, patch=4, classes=5, image=SMALL),
    "vit without token": ViT(dim=12, layers=2, heads=3, hidden=20, patch=4, classes=5, image=SMALL, class_token=False),
    "decoder": Decoder(**TEXT, kv_heads=4),
    "decoder with groups": Decoder(**TEXT, kv_heads=2),
    "decoder with tied output": Decoder(**TEXT, kv_heads=1, tied=True),
    "decoder with stacked layers": Decoder(**TEXT, kv_heads=2, scan=True),
}
