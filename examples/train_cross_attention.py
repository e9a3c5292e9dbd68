# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Trains a small byte-patch model, whose patches attend to their own 2 to 16 bytes.

    python examples/train_cross_attention.py [--seconds 60]

Text is cut into patches, at the ends of words. An encoder makes a vector of each patch: one query
attends to its bytes. A decoder predicts the bytes of the next patch from the last few vectors and
from the bytes before, to which they attend causally. Both are `small_seq_attention` with a batch
of thousands of patches. At the end its kernels and XLA take the same steps from the same start.

Training text is at hand wherever Python is: the sources of its standard library.
"""

import argparse
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from train_lm import adamw, read_sources

import jax_attn

LONGEST, SHORTEST = 16, 2  # bytes of a patch
STREAMS, PATCHES = 4, 128  # places in the text, and patches from each, in a step
WIDTH, HEADS = 128, 4
HISTORY = 4  # patch vectors that the decoder sees
NUM_BYTES = 257  # 256 begins a patch
LEARNING_RATE = 2e-3
COMPARED_STEPS = 8

Params = dict[str, jax.Array]
Batch = tuple[jax.Array, jax.Array]  # bytes [streams, patches, LONGEST] and lengths


def cut_into_patches(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the patches of a text, uint8 `[n, LONGEST]` padded by zeros, and their lengths.

    A patch ends after a space or a line, if it has SHORTEST bytes, or with LONGEST bytes.
    """
    starts, start = [0], 0
    for i in np.flatnonzero(np.isin(text, np.frombuffer(b" \n", np.uint8))) + 1:
        while i - start > LONGEST + SHORTEST - 1:
            start += LONGEST
            starts.append(start)
        if SHORTEST <= i - start <= LONGEST and len(text) - i >= SHORTEST:
            start = int(i)
            starts.append(start)
    bounds = np.array(starts)
    lengths = np.diff(bounds)
    index = bounds[:-1, None] + np.arange(LONGEST)
    inside = np.arange(LONGEST) < lengths[:, None]
    return np.where(inside, text[np.minimum(index, len(text) - 1)], 0), lengths.astype(np.int32)


def batches(text: np.ndarray, seed: int) -> Iterator[Batch]:
    """Yields runs of patches from random places, for ever."""
    patches, lengths = cut_into_patches(text)
    rng = np.random.default_rng(seed)
    while True:
        first = rng.integers(len(patches) - PATCHES, size=STREAMS)
        index = first[:, None] + np.arange(PATCHES)
        yield jnp.asarray(patches[index], jnp.int32), jnp.asarray(lengths[index])


def init_params(seed: int) -> Params:
    """Returns random parameters."""
    shapes = {
        "bytes": (NUM_BYTES, WIDTH),
        "places": (LONGEST, WIDTH),
        "query": (1, WIDTH),
        **{f"encode_{name}": (WIDTH, WIDTH) for name in ("key", "value", "out")},
        "history": (HISTORY * WIDTH, WIDTH),
        **{f"decode_{name}": (WIDTH, WIDTH) for name in ("query", "key", "value", "out")},
        "up": (WIDTH, 4 * WIDTH),
        "down": (4 * WIDTH, WIDTH),
        "logits": (WIDTH, 256),
    }
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: jax.random.normal(key, shape) * (shape[0] ** -0.5 if shape[0] >= WIDTH else 0.1)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def split_heads(x: jax.Array) -> jax.Array:
    """`[..., WIDTH]` to `[..., HEADS, head_dim]`."""
    return x.reshape(*x.shape[:-1], HEADS, WIDTH // HEADS)


def normed(x: jax.Array) -> jax.Array:
    """Divides by the root mean square."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def loss_of(params: Params, batch: Batch, implementation: Any) -> jax.Array:
    """Returns the mean cross entropy in nats per byte."""
    p, (text, lengths) = params, batch
    attend = functools.partial(
        jax_attn.small_seq_attention,
        kv_lengths=lengths.reshape(-1),
        implementation=implementation,
    )
    flat = text.reshape(-1, LONGEST)
    count = flat.shape[0]
    places = p["places"][None]

    # A vector of each patch.
    x = normed(p["bytes"][flat] + places)
    query = jnp.broadcast_to(split_heads(p["query"])[None], (count, 1, HEADS, WIDTH // HEADS))
    keys, values = (split_heads(x @ p[f"encode_{name}"]) for name in ("key", "value"))
    patch = attend(query, keys, values).reshape(count, WIDTH) @ p["encode_out"]

    # What came before each patch: the vectors of the last few, zeros at the beginning.
    streams = jnp.pad(patch.reshape(*text.shape[:2], WIDTH), ((0, 0), (HISTORY, 0), (0, 0)))
    recent = [streams[:, i : i + text.shape[1]] for i in range(HISTORY)]
    before = jnp.concatenate(recent, axis=-1).reshape(count, -1) @ p["history"]

    # Its bytes, each from those before it.
    begin = jnp.full_like(flat[:, :1], NUM_BYTES - 1)
    x = p["bytes"][jnp.concatenate([begin, flat[:, :-1]], axis=1)] + places + before[:, None]
    y = normed(x)
    parts = [split_heads(y @ p[f"decode_{name}"]) for name in ("query", "key", "value")]
    seen = attend(*parts, query_lengths=lengths.reshape(-1), causal="top_left")
    x = x + seen.reshape(x.shape) @ p["decode_out"]
    x = x + jax.nn.gelu(normed(x) @ p["up"]) @ p["down"]
    log_probabilities = jax.nn.log_softmax(normed(x) @ p["logits"])
    picked = jnp.take_along_axis(log_probabilities, flat[..., None], axis=-1)[..., 0]
    real = jnp.arange(LONGEST)[None] < lengths.reshape(-1, 1)
    return -jnp.sum(jnp.where(real, picked, 0)) / jnp.sum(lengths).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="implementation", donate_argnums=0)
def train_step(state: Any, batch: Batch, implementation: Any) -> tuple[Any, jax.Array]:
    """Returns parameters, moments and step after one more step, and its loss."""
    params, moments, step = state
    loss, gradients = jax.value_and_grad(loss_of)(params, batch, implementation)
    rate = LEARNING_RATE * jnp.minimum(1.0, (step.astype(jnp.float32) + 1) / 20)
    params, moments = adamw(params, gradients, moments, step, rate)
    return (params, moments, step + 1), loss


def start(seed: int) -> Any:
    """Returns parameters, moments and step before the first step."""
    params = init_params(seed)
    zeros = jax.tree.map(jnp.zeros_like, params)
    return params, (zeros, jax.tree.map(jnp.copy, zeros)), jnp.int32(0)


def train(text: np.ndarray, seconds: float, implementation: Any) -> list[float]:
    """Trains for some time with a progress bar, and returns the losses."""
    state, stream, losses = start(0), batches(text, 0), []
    state, loss = train_step(state, next(stream), implementation)  # compiles
    losses.append(float(loss))
    begin, shown = time.perf_counter(), 0.0
    with tqdm.tqdm(total=round(seconds), unit="s", bar_format="{l_bar}{bar}| {n:.0f} s") as bar:
        while shown < seconds:
            state, loss = train_step(state, next(stream), implementation)
            losses.append(float(loss))
            now = min(time.perf_counter() - begin, seconds)
            bar.update(now - shown)
            bar.set_description(f"step {len(losses)}, {losses[-1]:.3f} nats per byte")
            shown = now
    return losses


def compare(text: np.ndarray) -> dict[str, tuple[list[float], float]]:
    """Returns losses and seconds per step of both implementations from the same start."""
    found = {}
    for implementation in ("native", "xla"):
        state, stream, losses, times = start(1), batches(text, 1), [], []
        for _ in range(COMPARED_STEPS):
            batch = jax.block_until_ready(next(stream))
            begin = time.perf_counter()
            state, loss = train_step(state, batch, implementation)
            losses.append(float(loss))
            times.append(time.perf_counter() - begin)
        found[implementation] = losses, float(np.median(times[1:]))  # the first compiles
    return found


def plot(losses: Sequence[float], rows: int = 10, columns: int = 64) -> str:
    """Draws the losses as text, each column the mean of some steps."""
    parts = np.array_split(np.asarray(losses), min(columns, len(losses)))
    means = np.array([part.mean() for part in parts])
    low, high = means.min(), means.max()
    level = np.rint((means - low) / max(high - low, 1e-9) * (rows - 1)).astype(int)
    lines = []
    for row in range(rows - 1, -1, -1):
        label = low + (high - low) * row / (rows - 1)
        lines.append(f"{label:6.2f} |" + "".join("*" if at == row else " " for at in level))
    lines.append(" " * 7 + "+" + "-" * len(means))
    return "\n".join([*lines, f"{'':8}nats per byte over {len(losses)} steps"])


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Runs the command line, and returns the losses."""
    parser = argparse.ArgumentParser(description="Trains a byte-patch model.")
    parser.add_argument("--seconds", type=float, default=60, help="how long to train")
    arguments = parser.parse_args(argv)
    text, _ = read_sources()
    text = text[: 1 << 20]
    losses = train(text, arguments.seconds, None)
    print(plot(losses))
    if "cpu" not in jax_attn.platforms() or jax.default_backend() != "cpu":
        print("there are no kernels for this platform to compare with XLA")
        return losses
    found = compare(text)
    for implementation, (other, seconds) in found.items():
        print(f"{implementation:>7}: {1e3 * seconds:7.1f} ms per step, last loss {other[-1]:.5f}")
    (native, _), (xla, _) = found.values()
    difference = max(abs(a - b) for a, b in zip(native, xla, strict=True))
    print(f"largest difference of a loss: {difference:.1e}")
    return losses


if __name__ == "__main__":
    main()
