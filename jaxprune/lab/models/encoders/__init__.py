"""Encoders of texts, as modules of Equinox: what makes a vector of a sentence.

| module | holds |
|---|---|
| `bert` | the model, its files in Hugging Face's layout, vectors of sentences |
| `wordpiece` | its tokenizer |

Nothing of training enters here, and nothing that prunes.
"""
