"""Writing a pruned language model as what it was: a file of llama2.c, GGUF, a folder of Hugging Face's; and as ours."""

import dataclasses
import shutil
from pathlib import Path

import jaxprune as jp
from jaxprune import files
from jaxprune.lab.models.language import blocks, gguf, hugging_face, llama2c, tokenizers
from jaxprune.lab.models.language.files import GGUF as GGUF_NAMES
from jaxprune.lab.models.language.files import Language, spread
from jaxprune.types import Masks, Params

OURS, GGUF, LLAMA2C, TOKENIZER = "model.jaxprune", "model.gguf", "model.bin", "tokenizer.bin"
_TYPES = {"jaxprune": ("F32",), "llama2c": ("F32",), "hugging_face": tuple(blocks.PLAIN), "gguf": blocks.WRITTEN}


def kind_of(path: Path) -> str:
    """What a language model lies in: "jaxprune", "hugging_face", "gguf" or "llama2c"."""
    if path.is_dir():
        return "jaxprune" if (path / OURS).exists() else "hugging_face"
    if path.suffix == ".jaxprune":
        return "jaxprune"
    with path.open("rb") as file:
        return "gguf" if file.read(4) == b"GGUF" else "llama2c"


def tokenizer_in(folder: Path) -> tokenizers.Tokenizer | None:
    """The tokenizer of a folder that `Writer` wrote; None where its model had none."""
    if (folder / GGUF).exists():
        about = gguf.read(folder / GGUF).metadata
        return tokenizers.of_gguf(about) if "tokenizer.ggml.model" in about else None
    if (folder / TOKENIZER).exists():
        return tokenizers.of_llama2c((folder / TOKENIZER).read_bytes())
    return None


class Writer:
    """Writes a model as another one was.

    Args:
        source: file or folder of that one.
        model: what it holds.
        type: of the matrices; "": float32, of GGUF F16.

    Raises:
        ValueError: a type that is not written, or loses zeros, or that the matrices have no whole blocks of.
    """

    def __init__(self, source: Path, model: Language, type: str) -> None:
        self.source, self.model, self.kind = source, model, kind_of(source)
        self.type = type or ("F16" if self.kind == "gguf" else "F32")
        if self.type in blocks.LOSE_ZEROS:
            raise ValueError(
                f"--format {self.type} loses zeros: it moves them to the nearest of its values, which is hardly ever "
                f"zero. Take {', '.join(blocks.WRITTEN)}."
            )
        if self.type not in _TYPES[self.kind]:
            raise ValueError(
                f"--format {self.type} is not written for {source}. There are: {', '.join(_TYPES[self.kind])}."
            )
        for array in spread(model.params, GGUF_NAMES).values():
            blocks.nbytes(self.type if array.ndim > 1 else "F32", array.shape)

    def write(self, out: Path, params: Params, masks: Masks) -> list[Path]:
        """The files, ours the first: float32, with masks.

        Args:
            out: folder.
            params: pruned.
            masks: of them.
        """
        config = self.model.config
        jp.save(out / OURS, params, masks=masks, metadata={"decoder": dataclasses.asdict(config)})
        if self.kind == "gguf":
            about = {key: value for key, value in self.model.metadata.items() if key != "general.file_type"}
            gguf.write_model(out / GGUF, params, config, type=self.type, metadata=about)
        elif self.kind == "llama2c":
            llama2c.write(out / LLAMA2C, params, config)
            if isinstance(known := self.model.tokenizer, tokenizers.Pieces):
                files.write(out / TOKENIZER, llama2c.write_tokenizer(list(known.pieces), list(known.scores)))
        elif self.kind == "hugging_face":
            dtype = blocks.PLAIN[self.type]
            hugging_face.write(out, params, config, metadata=self.model.metadata, dtype=dtype)
            for path in self._beside():
                shutil.copy(path, out / path.name)
        names = {"gguf": GGUF, "llama2c": LLAMA2C, "hugging_face": hugging_face.WEIGHTS}
        return [out / OURS] + ([out / names[self.kind]] if self.kind in names else [])

    def _beside(self) -> list[Path]:
        """What transformers reads besides config and weights: tokenizers and settings of generation."""
        names = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "generation_config.json")
        return [path for name in names for path in sorted(self.source.glob(name))]
