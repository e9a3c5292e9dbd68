# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Text to tokens and back: `tokenizer.json` of a checkpoint, or plain bytes."""

import json
import pathlib
from typing import Protocol

from checkpoint import BYTES_BOS, BYTES_VOCAB_SIZE
from model import ModelConfig


class Tokenizer(Protocol):
    """What `generate.py` needs of a tokenizer."""

    end_tokens: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a prompt, those that begin a text included."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of tokens; an unfinished character gives U+FFFD."""
        ...


class ByteTokenizer:
    """UTF-8 bytes, after a token that begins the text. No token ends it."""

    end_tokens: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        """Returns BOS and the bytes."""
        return [BYTES_BOS, *text.encode()]

    def decode(self, tokens: list[int]) -> str:
        """Returns the text, without BOS."""
        return bytes(t for t in tokens if t < BYTES_BOS).decode(errors="replace")


class FileTokenizer:
    """A `tokenizer.json`, read by the tokenizers package."""

    def __init__(self, path: pathlib.Path, end_tokens: frozenset[int]):
        """Reads the file."""
        import tokenizers  # Here, since a byte model does without.

        self.end_tokens = end_tokens
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        """Returns the tokens, with the special ones that the file's post-processor adds."""
        return self._tokenizer.encode(text).ids

    def decode(self, tokens: list[int]) -> str:
        """Returns the text, without special tokens."""
        return self._tokenizer.decode(tokens)


def load(folder: pathlib.Path, config: ModelConfig) -> Tokenizer:
    """Returns the tokenizer of a checkpoint.

    Args:
      folder: The checkpoint.
      config: Its sizes.

    Raises:
      FileNotFoundError: If there is no `tokenizer.json` and the vocabulary is not bytes.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        return FileTokenizer(path, _end_tokens(folder))
    if config.vocab_size == BYTES_VOCAB_SIZE:
        return ByteTokenizer()
    raise FileNotFoundError(
        f"{path} is missing; only a vocabulary of {BYTES_VOCAB_SIZE} (bytes) does without, this "
        f"has {config.vocab_size}."
    )


def _end_tokens(folder: pathlib.Path) -> frozenset[int]:
    """Returns the tokens that end a text, by the first file that names some."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        ends = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        if ends is not None:
            return frozenset(ends if isinstance(ends, list) else [ends])
    return frozenset()
