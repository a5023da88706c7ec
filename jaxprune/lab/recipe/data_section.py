"""The [data] and [model] sections: what is trained, and on what; ours by a name, a user's own as MODULE:NAME."""

import json
from typing import Annotated, Any

import pydantic
from pydantic import AfterValidator, Field

from jaxprune.lab.recipe import words
from jaxprune.lab.recipe.fields import ARRAY, Count, Fraction, Only, Table
from jaxprune.lab.recipe.problems import show


def _options(value: dict[str, pydantic.JsonValue] | None, info: pydantic.ValidationInfo) -> Any:
    name = info.data.get("name", ":")
    if value is not None and ":" not in name:
        raise ValueError(f"only for a name of your own, MODULE:NAME, here name = {show(name)}")
    return value and json.loads(json.dumps(value, sort_keys=True))  # an order that means nothing changes no hash


Options = Annotated[dict[str, pydantic.JsonValue] | None, AfterValidator(_options)]


class Data(Table):
    """Where samples come from. `data_dir` "": TFDS's default.

    `validation`: fraction of the training data held out. In training, images are moved at random by up to `shift`
    pixels up or down and sideways, and with `flip` every other one is mirrored.

    A data set of your own is a function, `name = "module:function"`, found from the folder the command runs in. It is
    called with the [data.options] as keywords, and with `data_dir` if there is one, and returns

        (train inputs, train labels), (test inputs, test labels)

    as arrays: inputs of shape (n, ...), uint8, which are divided by 255 (n, h, w are given a channel), or floats, which
    are taken as they are; labels integers of shape (n,), from 0 on. It has to return the same every time: a run that
    goes on after a stop calls it again.
    """

    name: Annotated[str, words.word("data set")] = "digits"
    options: Options = None
    data_dir: str = ""
    validation: Fraction = 0.1
    shift: Annotated[int, Field(ge=0, le=8)] = 0
    flip: bool = False


class Model(Table):
    """Which network. `widths`: hidden widths of the mlp; `dropout`: fraction of activations dropped in training, of the
    small models (mlp to tf_tutorial_cnn).

    `adjust_dropout`: whether that falls with the weights that are left, see `jaxprune.training.adjusted_dropout`.

    A model of your own is a Flax NNX class, `name = "module:Class"`, found from the folder the command runs in, and
    made as `Class(image=(28, 28, 1), classes=10, rngs=nnx.Rngs(...), **options)`, `image` being the shape of one input
    and the options those of [model.options]. Called with inputs (batch, *image), float32, it returns logits
    (batch, classes). Its `nnx.Param`s are trained; `nnx.BatchNorm` and `nnx.Dropout` do in training what they do after
    `model.train()`, else what they do after `model.eval()`.

    Or it is a function for any other framework, called as `function(image=..., classes=..., key=..., **options)`, which
    returns `(params, apply)`: a pytree of arrays, and `apply(params, inputs)`, which gives the logits. If `apply` takes
    a `key`, it is given one in training and none else, for dropout.
    """

    name: Annotated[str, words.word("model")] = "mlp"
    options: Options = None
    widths: Annotated[tuple[Count, ...], ARRAY, Only(("name", "mlp"))] = (300, 100)
    dropout: Fraction = 0.0
    adjust_dropout: bool = False

    @pydantic.field_validator("dropout")
    @classmethod
    def _of_a_model_that_drops(cls, value: float, info: pydantic.ValidationInfo) -> float:
        name = info.data.get("name", "mlp")
        if value and name not in words.DROPPING:
            own = ": give it to your own model as one of its options" if ":" in name else ""
            meant = " or ".join(map(show, words.DROPPING))
            raise ValueError(f"only for name = {meant}, here name = {show(name)}{own}")
        return value

    @pydantic.field_validator("adjust_dropout")
    @classmethod
    def _of_some_dropout(cls, value: bool, info: pydantic.ValidationInfo) -> bool:
        if value and not info.data.get("dropout"):
            raise ValueError("has no effect without dropout")
        return value
