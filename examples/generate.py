# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Generates text for a batch of prompts with a paged KV cache.

    python examples/generate.py
    python examples/generate.py --model path/to/Qwen3-0.6B --prompt "Attention is" "A page table"

The model that comes with the example wrote some Python once (see `train_lm.py`); any Qwen3 or
Llama checkpoint in a local folder works too. Prompts of different lengths are prefilled and
decoded as one batch. Everything is done twice, by the compiled kernels and by the `jax.numpy`
reference: both speeds are printed, and both must choose the same tokens. A third run, with the
reference for the pass from the QKV projection to the cache only, shows what fusing it saves.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import checkpoint
import jax
import jax.numpy as jnp
import numpy as np
import tokenizer
from display import Display
from jax import lax
from model import MeshAxes, ModelConfig, Params, decode, make_rope, unembed

import jax_attn

DEFAULT_MODEL = pathlib.Path(__file__).parent / "model"
PAGE_SIZE = 16
CHUNK = 16  # Tokens that a dispatch decodes: a loop on the device, not one in Python.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
# Rounding may turn a choice between two tokens whose scores are as close as this.
TIE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.06}
PROMPTS = [
    "def main(",
    'class Stack:\n    """A last-in, first-out list."""\n\n    def __init__(self):\n',
    "import os\nimport sys\n\n\ndef read_lines(path):\n"
    '    """Return the lines of a text file, without their line ends."""\n    with open(',
    "#!/usr/bin/env python3\n"
    '"""Count the words of files and print the most frequent ones."""\n\n'
    "import argparse\nimport collections\nimport re\n\n\n"
    'def count_words(text):\n    """Return a dictionary from words to their counts."""\n'
    "    counts = {}\n    for word in re.findall(",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    """The arrays of a model: its parameters and rotary tables."""

    params: Params
    rope: jax_attn.Rope


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compiled in."""

    config: ModelConfig
    temperature: float = 0.0
    implementation: str | None = None
    qkv_implementation: str | None = None
    axes: MeshAxes | None = None


@dataclasses.dataclass(frozen=True)
class Generated:
    """What a run gave."""

    tokens: np.ndarray  # int32 [batch, num_tokens]
    margins: np.ndarray  # float32 [batch, num_tokens]: score of the choice less the second best
    num_decoded: int  # by the decode loop; the first token of a sequence comes of the prefill
    prefill_seconds: float
    decode_seconds: float
    best_chunk_seconds: float = 0.0  # of the fastest chunk; 0 if nothing was decoded


def choose(
    logits: jax.Array, key: jax.Array, kv_lengths: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Picks the next tokens of `[batch, vocab_size]` logits, and says by what margin.

    Sampling adds Gumbel noise that depends on the seed and the lengths only, so that every
    implementation draws the same.
    """
    scores = logits
    if temperature:
        noise = jax.random.gumbel(jax.random.fold_in(key, jnp.sum(kv_lengths)), logits.shape)
        scores = logits / temperature + noise
    best, tokens = lax.top_k(scores, 2)
    return tokens[:, 0], best[:, 0] - best[:, 1]


def next_tokens(
    model: Model,
    tokens: jax.Array,
    cache: jax_attn.PagedKVCache,
    page_table: jax.Array,
    kv_lengths: jax.Array,
    key: jax.Array,
    options: Options,
) -> Any:
    """Runs the new tokens `[batch, length]`, left-padded; returns the next ones and the cache."""
    hidden, cache = decode(
        model.params,
        options.config,
        tokens,
        cache,
        page_table,
        kv_lengths,
        model.rope,
        implementation=options.implementation,
        qkv_implementation=options.qkv_implementation,
        axes=options.axes,
    )
    logits = unembed(model.params, options.config, hidden[:, -1])
    return *choose(logits, key, kv_lengths, options.temperature), cache


def next_chunk(
    model: Model,
    tokens: jax.Array,
    cache: jax_attn.PagedKVCache,
    page_table: jax.Array,
    kv_lengths: jax.Array,
    key: jax.Array,
    options: Options,
) -> Any:
    """Decodes CHUNK tokens after `tokens` `[batch]`; the cache is carried from one to the next."""

    def step(carry: Any, _: None) -> Any:
        tokens, cache, kv_lengths = carry
        kv_lengths = kv_lengths + 1
        tokens, margins, cache = next_tokens(
            model, tokens[:, None], cache, page_table, kv_lengths, key, options
        )
        return (tokens, cache, kv_lengths), (tokens, margins)

    (_, cache, _), (tokens, margins) = lax.scan(step, (tokens, cache, kv_lengths), length=CHUNK)
    return tokens.T, margins.T, cache


prefill = jax.jit(next_tokens, static_argnames="options", donate_argnames="cache")
decode_chunk = jax.jit(next_chunk, static_argnames="options", donate_argnames="cache")


def generate(
    model: Model,
    options: Options,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    seed: int = 0,
    end_tokens: frozenset[int] = frozenset(),
    on_tokens: Callable[[np.ndarray], None] = lambda tokens: None,
) -> Generated:
    """Continues all prompts as one batch.

    Args:
      model: The model; its rotary tables bound the contexts.
      options: How to run it.
      prompts: Tokens of each prompt, at least one.
      num_tokens: How many to generate for each.
      seed: Of sampling.
      end_tokens: Generation ends once all sequences have one.
      on_tokens: Called with all tokens so far, `[batch, n]`, after the prefill and each chunk.

    Returns:
      Tokens and times. Compilation is not timed.
    """
    config = options.config
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    num_chunks = -(-(num_tokens - 1) // CHUNK)
    max_pages = num_pages(lengths + num_chunks * CHUNK)
    allocator = jax_attn.PageAllocator(int(max_pages.sum()))
    page_table = np.full((len(prompts), max_pages.max()), -1, np.int32)
    cache = jax_attn.PagedKVCache.zeros(
        allocator.num_free,
        PAGE_SIZE,
        config.num_kv_heads,
        config.head_dim,
        num_layers=config.num_layers,
        dtype=model.params["embed"].dtype,
    )
    padded = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
    key = jax.random.key(seed)

    # Compiled before anything is timed.
    rest = (cache, page_table, lengths, key)
    run_prefill = prefill.lower(model, padded, *rest, options=options).compile()
    run_chunk = decode_chunk.lower(model, padded[:, 0], *rest, options=options).compile()

    seconds: list[list[float]] = [[], []]
    outputs: list[list[np.ndarray]] = [[], []]

    def run(part: int, compiled: Any, new: np.ndarray, cache: Any) -> Any:
        start = time.perf_counter()
        tokens, margins, cache = compiled(model, new, cache, page_table, lengths, key)
        shape = (len(prompts), -1)
        outputs[0].append(np.asarray(tokens).reshape(shape))
        outputs[1].append(np.asarray(margins).reshape(shape))
        seconds[part].append(time.perf_counter() - start)
        return np.concatenate(outputs[0], axis=1), cache

    reserve_pages(allocator, page_table, lengths)
    tokens, cache = run(0, run_prefill, padded, cache)
    on_tokens(tokens)
    while tokens.shape[1] < num_tokens and not all(
        end_tokens & set(row) for row in tokens.tolist()
    ):
        # `lengths` are those of the cache, which the newest token is not in yet.
        reserve_pages(allocator, page_table, lengths + CHUNK)
        tokens, cache = run(1, run_chunk, tokens[:, -1], cache)
        lengths = lengths + CHUNK
        on_tokens(tokens[:, :num_tokens])
    margins = np.concatenate(outputs[1], axis=1)
    return Generated(
        tokens[:, :num_tokens],
        margins[:, :num_tokens],
        tokens.size - len(tokens),
        *map(sum, seconds),
        best_chunk_seconds=min(seconds[1], default=0.0),
    )


def num_pages(lengths: np.ndarray) -> np.ndarray:
    """Returns the pages that contexts of these lengths fill."""
    return -(-lengths // PAGE_SIZE)


def reserve_pages(
    allocator: jax_attn.PageAllocator, page_table: np.ndarray, lengths: np.ndarray
) -> None:
    """Extends the page table, in place, to contexts of these lengths."""
    for row, needed in zip(page_table, num_pages(lengths), strict=True):
        used = np.count_nonzero(row >= 0)
        row[used:needed] = allocator.alloc(needed - used)


def first_disagreement(a: Generated, b: Generated, tie: float) -> str | None:
    """Says where two runs chose different tokens though the choice was clear, None for nowhere."""
    length = min(a.tokens.shape[1], b.tokens.shape[1])
    for row, differs in enumerate(a.tokens[:, :length] != b.tokens[:, :length]):
        at = int(np.argmax(differs))
        # After a tie the texts are different ones, and no longer comparable.
        if differs[at] and a.margins[row, at] > tie:
            return (
                f"sequence {row + 1}, token {at + 1}: {a.tokens[row, at]} and {b.tokens[row, at]}, "
                f"with scores {a.margins[row, at]:.3g} apart"
            )
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Generates text with a paged KV cache.")
    parser.add_argument("--model", type=pathlib.Path, default=DEFAULT_MODEL, help="folder")
    parser.add_argument("--prompt", nargs="+", default=PROMPTS, help="one or more texts")
    parser.add_argument("--tokens", type=int, default=200, help="to generate for each prompt")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the best token")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="to compute in")
    args = parser.parse_args(arguments)
    if args.tokens < 1 or args.temperature < 0:
        parser.error("--tokens must be positive and --temperature must not be negative")
    try:
        config, params = checkpoint.load(args.model, DTYPES[args.dtype])
        words = tokenizer.load(args.model, config)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    prompts = [words.encode(text) for text in args.prompt]
    lengths = sorted(len(prompt) for prompt in prompts)
    if lengths[0] == 0:
        parser.error("an empty prompt has no tokens with this tokenizer")
    if lengths[-1] + args.tokens > config.context:
        parser.error(
            f"a prompt of {lengths[-1]} tokens and {args.tokens} more do not fit the model's "
            f"context of {config.context}"
        )

    model = Model(params, make_rope(config, config.context))
    options = Options(config, args.temperature)
    settings = {"seed": args.seed, "end_tokens": words.end_tokens}
    with Display(args.prompt, args.tokens) as display:

        def show(tokens: np.ndarray) -> None:
            texts = [words.decode(until_end(row, words.end_tokens)) for row in tokens.tolist()]
            display.update(texts, tokens.shape[1])

        ours = generate(model, options, prompts, args.tokens, on_tokens=show, **settings)
    separate = dataclasses.replace(options, qkv_implementation="xla")
    without = generate(model, separate, prompts, args.tokens, **settings)
    xla = dataclasses.replace(separate, implementation="xla")
    reference = generate(model, xla, prompts, args.tokens, **settings)

    print(
        f"\n{len(prompts)} sequences, prompts of {lengths[0]} to {lengths[-1]} tokens, "
        f"{args.tokens} new ones each, {args.dtype}, {jax.devices()[0].device_kind}"
    )
    print(f"compiled kernels in this build: {', '.join(jax_attn.platforms()) or 'none'}")
    print("tokens/s                  decoding   with prefill")
    runs = {"jax_attn": ours, "  without its QKV pass": without, 'implementation="xla"': reference}
    for name, run in runs.items():
        rate = run.num_decoded / run.decode_seconds if run.num_decoded else 0
        total = run.prefill_seconds + run.decode_seconds
        print(f"{name:26}{rate:8.0f} {(run.num_decoded + len(prompts)) / total:14.0f}")
    if ours.best_chunk_seconds:
        # Of the fastest chunks: the machine may have done other things during one of the runs.
        fused, unfused = (
            1e6 * run.best_chunk_seconds / (CHUNK * len(prompts)) for run in (ours, without)
        )
        print(
            f"fused_qkv_rope_cache saves {round(unfused - fused)} us per token: "
            f"{fused:.0f} us with it and {unfused:.0f} us without"
        )
    problem = first_disagreement(ours, reference, TIE[args.dtype])
    if problem:
        print(f"the two chose different tokens: {problem}", file=sys.stderr)
        return 1
    same = int((ours.tokens == reference.tokens).sum())
    print(f"both chose the same tokens: {same} of {ours.tokens.size}")
    return 0


def until_end(tokens: list[int], end_tokens: frozenset[int]) -> list[int]:
    """Returns the tokens before the first that ends a text."""
    ends = (i for i, token in enumerate(tokens) if token in end_tokens)
    return tokens[: next(ends, len(tokens))]


if __name__ == "__main__":
    sys.exit(main())
