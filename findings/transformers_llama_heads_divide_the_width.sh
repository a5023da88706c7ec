#!/usr/bin/env bash
# transformers 5.24.0 (without PyTorch), Python 3.11 or newer.
#
# Guess: a configuration that says `head_dim` itself need not have a width that its number of heads divides; the field
#   is there for that, and models whose heads are together wider than the model are published with it.
# Seen: `LlamaConfig(hidden_size=288, num_attention_heads=5, head_dim=48)` is refused, since 288 is no multiple of 5.
#   `MistralConfig`, `Qwen3Config`, `OLMo2`, `Granite` and `SmolLM3`, which have the same field, take the same numbers.
# What it means: a Llama from which whole heads were pruned opens only if the heads left happen to divide the width (4 of
#   6 do, 5 of 6 do not). The check is Llama's alone: as a Mistral without a sliding window, the same arithmetic under
#   another name, it opens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.11 "$HOME"/.pyenv/versions/3.11*/bin/python python3; do
  "$python" -c "import venv" >/dev/null 2>&1 && break
done
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - <<'PY'
import transformers

numbers = {"hidden_size": 288, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 48}
took = {}
for name in ("Llama", "Mistral", "Qwen3", "Olmo2", "Granite", "SmolLM3"):
    try:
        took[name] = getattr(transformers, f"{name}Config")(**numbers).head_dim == 48
    except Exception as error:
        took[name], said = False, error
print(took)
print("Llama says:", said)
assert took == {"Llama": False, "Mistral": True, "Qwen3": True, "Olmo2": True, "Granite": True, "SmolLM3": True}
assert transformers.LlamaConfig(**numbers | {"num_attention_heads": 4, "num_key_value_heads": 4}).head_dim == 48
PY
