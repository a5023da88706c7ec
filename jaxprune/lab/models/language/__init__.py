"""Language models: decoders as functions of plain params, BERT, files, tokenizers, and what to measure on texts.

| module | holds |
|---|---|
| `config` | the sizes of a decoder |
| `decoder` | `forward`, and `step` with a cache; the same params stacked, or for the other way of rotary positions |
| `module` | the same decoder as a module of Flax NNX |
| `files` | what a file holds, and names of leaves in other formats |
| `llama2c`, `gguf`, `hugging_face` | files, read and written |
| `blocks` | the types of GGUF's tensors |
| `tokenizers` | SentencePiece's and GPT-2's way |
| `bert`, `wordpiece` | an encoder in Equinox with its files and vectors of sentences, and its tokenizer |
| `evaluation` | perplexity, divergence from dense, agreement |
| `texts` | texts that a model samples itself, and windows of any text |

Nothing of training enters here, and nothing that prunes.
"""

import os
from pathlib import Path

from jaxprune.lab.models.language import gguf, hugging_face, llama2c, tokenizers
from jaxprune.lab.models.language.files import Language


def read(path: str | os.PathLike[str]) -> Language:
    """A model with its tokenizer: a GGUF file, a folder of Hugging Face's, or llama2.c's file.

    A tokenizer.bin of llama2.c is found behind the weights in the same file, or beside it.

    Raises:
        FileError: it is none of these, or damaged.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return hugging_face.read(path)
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    if is_gguf:
        return gguf.read_model(path)
    found = llama2c.read(path)
    beside = path.with_name("tokenizer.bin")
    data = found.rest or (beside.read_bytes() if beside.exists() else b"")
    return Language(found.params, found.config, tokenizers.of_llama2c(data) if data else None, {})
