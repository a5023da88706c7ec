"""Language models: decoders as functions of plain params, their files, their tokenizers, and what to measure on texts.

| module | holds |
|---|---|
| `config` | the sizes of a decoder |
| `decoder` | `forward`, and `step` with a cache; the same params stacked, or for the other way of rotary positions |
| `llama2c` | files of llama2.c and its tokenizer's |
| `evaluation` | perplexity, divergence from dense, agreement |
| `texts` | texts that a model samples itself, and windows of books |

Nothing of training enters here, and nothing that prunes.
"""
