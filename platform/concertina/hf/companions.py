"""What lies beside config.json and weights in a folder of Hugging Face's? Tokenizer, generation settings, a card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from concertina import __version__
from concertina.config import ModelConfig, count_parameters
from concertina.data.tokenizer import end_of_text_id, load_tokenizer
from concertina.hf.config_json import TRANSFORMERS, SpecialTokens

__all__ = [
    "COMPANIONS",
    "TOKENIZER",
    "add_tokenizer",
    "generation_config",
    "model_card",
    "special_tokens",
    "write_json",
]

TOKENIZER = "tokenizer.json"
_GENERATION = "generation_config.json"
_TOKENIZER_FILES = (
    *(TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"),
)
COMPANIONS = (*_TOKENIZER_FILES, _GENERATION)
"""What an import keeps and an export of it gives back."""


def special_tokens(folder: Path | None) -> SpecialTokens:
    """Of the config.json that was imported, or, where there is none, of the tokenizer."""
    if folder is not None and (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if folder is not None and (folder / TOKENIZER).is_file():
        return {"eos_token_id": end_of_text_id(load_tokenizer(folder / TOKENIZER))}
    return {}


def add_tokenizer(folder: Path | None, out: Path, longest: int) -> bool:
    """Copy a tokenizer's files; without a tokenizer_config.json among them write one. False: there is no tokenizer."""
    if folder is None or not (folder / TOKENIZER).is_file():
        return False
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    if not (out / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(folder / TOKENIZER)
        end = end_of_text_id(tokenizer)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": longest,
            "clean_up_tokenization_spaces": False,
            **({} if end is None else {"eos_token": tokenizer.id_to_token(end)}),
        }
        write_json(out / "tokenizer_config.json", settings)
    return True


def generation_config(folder: Path | None, out: Path, tokens: SpecialTokens) -> None:
    """That of the import, or what follows from the special tokens."""
    if folder is not None and (folder / _GENERATION).is_file():
        shutil.copyfile(folder / _GENERATION, out / _GENERATION)
        return
    given = {key: value for key, value in tokens.items() if value is not None}
    write_json(out / _GENERATION, {"_from_model_config": True, **given, "transformers_version": TRANSFORMERS})


def model_card(name: str, model: ModelConfig, facts: Mapping[str, Any]) -> str:
    """README.md: what it is, where it comes from (`facts`, absent ones left out), how it is loaded."""
    total, active = count_parameters(model)
    rows = {"parameters": f"{total:,}, of which a token meets {active:,}", **facts}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value is not None)
    return f"""---
library_name: transformers
tags: [mixture-of-experts, concertina]
---

# {name}

A Mixture-of-Experts language model, trained with Concertina {__version__} and exported by it.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")
```
"""


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """With two spaces and a last line end, as transformers writes."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
