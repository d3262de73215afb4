"""README.md of a Hugging Face export: what the model is and how to load it, from what the checkpoint tells."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron.crystalcoder.model.config import ModelConfig

CARD = "README.md"


def write_model_card(target: Path, name: str, config: ModelConfig, dtype: torch.dtype) -> None:
    """Write `target`/README.md. config: the model's own, unpadded sizes; dtype: of the stored weights."""
    has_tokenizer = (target / "tokenizer.json").is_file()
    (target / CARD).write_text(_card(name, config, dtype, has_tokenizer))


def _card(name: str, config: ModelConfig, dtype: torch.dtype, has_tokenizer: bool) -> str:
    stored = str(dtype).removeprefix("torch.")
    mup = config.mup
    facts = {
        "parameters": f"{config.num_parameters:,}",
        "layers": config.num_layers,
        "hidden size": config.hidden_size,
        "attention heads": config.num_attention_heads,
        "FFN (SwiGLU)": config.ffn_hidden_size,
        "vocabulary": f"{config.vocab_size:,}",
        "context": f"{config.max_sequence_length:,} tokens",
        "positions": f"rotary, {config.rotary_dim} of each head's {config.head_dim} dimensions",
        "muP": f"embeddings × {mup.embeddings_scale:g}, logits × {mup.output_alpha:g} · {mup.width_scale:g}, attention "
        f"over {'d' if mup.scale_qk_dot_by_d else '√d'}",
        "stored as": f"{stored} safetensors",
    }
    table = "\n".join(f"| {what} | {value} |" for what, value in facts.items())
    use = _WITH_TOKENIZER if has_tokenizer else _WITHOUT_TOKENIZER
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- crystalcoder
- code
- mup
---

# {name}

A CrystalCoder: a decoder-only transformer for text and code, with muP's constant factors.

| | |
|---|---|
{table}

## Use

`trust_remote_code=True` runs the model's code that lies in this directory.

```python
{use}```

Before you publish it, add what this file cannot know: licence, training data, evaluation and limits.
"""


_LOAD = """model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype="auto")
"""
_WITHOUT_TOKENIZER = (
    """from transformers import AutoModelForCausalLM

path = "."  # this directory, or its name on the hub
"""
    + _LOAD
)
_WITH_TOKENIZER = (
    """from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory, or its name on the hub
"""
    + _LOAD
    + """tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)

inputs = tokenizer("<s>def fibonacci(n):", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))

# An instruction-tuned model answers in its chat template:
messages = [{"role": "user", "content": "Write a haiku about checkpoints."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
"""
)
