# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Shows a batch of texts while they grow."""

import shutil
import sys
from types import TracebackType
from typing import Self

import tqdm

_ENTER, _CLEAR, _LEAVE = "\x1b[?1049h", "\x1b[H\x1b[2J", "\x1b[?1049l"  # the alternate screen


class Display:
    """A window per text on a terminal, plain text elsewhere.

    On a terminal the windows live on the alternate screen, and the whole texts are printed when
    they are finished. Elsewhere a single text is appended to as it comes; of several, a progress
    bar on stderr tells until they are finished.
    """

    def __init__(self, prompts: list[str], num_tokens: int):
        """Starts with the prompts.

        Args:
          prompts: Texts to be continued.
          num_tokens: Tokens that each will get.
        """
        self._prompts = prompts
        self._texts = [""] * len(prompts)
        self._shown = 0  # characters of the text that is appended to
        self._appends = len(prompts) == 1 and not sys.stdout.isatty()
        self._on_screen = sys.stdout.isatty()
        self._progress = tqdm.tqdm(
            total=num_tokens,
            unit="token",
            desc=f"{len(prompts)} texts",
            disable=self._appends or self._on_screen,
        )

    def __enter__(self) -> Self:
        if self._on_screen:
            print(_ENTER, end="")
        elif self._appends:
            print(_title(1, self._prompts[0]))
            print(_printable(self._prompts[0]), end="", flush=True)
        return self

    def update(self, texts: list[str], num_tokens: int) -> None:
        """Shows the continuations, which have `num_tokens` tokens so far."""
        if self._appends:
            self._append(texts[0].rstrip("\ufffd"))  # Part of a character is no text yet.
        self._texts = texts
        self._progress.update(num_tokens - self._progress.n)
        if self._on_screen:
            self._draw()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.close()
        if self._on_screen:
            print(_LEAVE, end="", flush=True)
        if kind is not None:
            return
        if self._appends:
            self._append(self._texts[0])
            print()
            return
        for i, (prompt, text) in enumerate(zip(self._prompts, self._texts, strict=True), 1):
            print(_title(i, prompt))
            print(_printable(prompt + text))

    def _append(self, text: str) -> None:
        print(_printable(text[self._shown :]), end="", flush=True)
        self._shown = len(text)

    def _draw(self) -> None:
        columns, lines = shutil.get_terminal_size()
        rows = max(2, lines // len(self._prompts))
        screen = []
        for i, (prompt, text) in enumerate(zip(self._prompts, self._texts, strict=True), 1):
            wrapped = [
                line[start : start + columns]
                for line in _printable(prompt + text).expandtabs(4).split("\n")
                for start in range(0, max(1, len(line)), columns)
            ]
            window = wrapped[-(rows - 1) :]
            screen += [_title(i, prompt)[:columns], *window, *[""] * (rows - 1 - len(window))]
        print(_CLEAR + "\n".join(screen[:lines]), end="", flush=True)


def _title(number: int, prompt: str) -> str:
    return f"── {number}: {len(prompt)} characters continued ".ljust(72, "─")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
