# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Trains the model that `generate.py` uses: bytes of the Python standard library's sources.

    python examples/train_lm.py --steps 2000 --out examples/model

Needs jax, numpy, safetensors and tqdm, and no part of jax_attn. Training text is at hand wherever
Python is: nothing is downloaded. A context begins with the token 256, then come bytes from the
start of a random line. Files are taken in order of their paths; every fiftieth is held out.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import sysconfig
import time
from typing import Any

import checkpoint
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax import lax
from model import ModelConfig, Params, init_params, is_norm, train_logits

STEPS_PER_CALL = 50  # One dispatch runs many steps: a step takes less than a launch otherwise.
CONFIG = ModelConfig(
    vocab_size=checkpoint.BYTES_VOCAB_SIZE,
    hidden_size=128,
    mlp_size=416,
    num_layers=6,
    num_q_heads=8,
    num_kv_heads=2,
    head_dim=32,
    context=1024,
)


def read_sources() -> tuple[np.ndarray, np.ndarray]:
    """Returns the bytes of training and of validation files, without tests and code tables."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
    files = {path.relative_to(root): path for path in root.rglob("*.py")}
    texts = [files[name].read_bytes() for name in sorted(files) if not skipped & set(name.parts)]
    texts = [text for text in texts if text]
    train = b"".join(text for i, text in enumerate(texts) if i % 50)
    return np.frombuffer(train, np.uint8), np.frombuffer(b"".join(texts[::50]), np.uint8)


def with_bos(targets: jax.Array) -> jax.Array:
    """Returns the inputs that should give these targets: shifted by one, led by BOS."""
    bos = jnp.full_like(targets[:, :1], checkpoint.BYTES_BOS)
    return jnp.concatenate([bos, targets[:, :-1]], axis=1)


def loss_of(params: Params, targets: jax.Array, attention: str) -> jax.Array:
    """Returns the mean cross entropy in nats per byte, computed in bfloat16."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    logits = train_logits(params, CONFIG, with_bos(targets), attention)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def learning_rate(step: jax.Array, peak: float, steps: int) -> jax.Array:
    """Warms up over the first 2 %, then falls as a cosine to 5 % of the peak."""
    warmup = max(1, steps // 50)
    step = step.astype(jnp.float32)
    progress = jnp.clip((step - warmup) / max(1, steps - warmup), 0, 1)
    cosine = 0.05 + 0.95 * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return peak * jnp.where(step < warmup, (step + 1) / warmup, cosine)


def adamw(params: Params, grads: Params, moments: Any, step: jax.Array, rate: jax.Array) -> Any:
    """Returns parameters and moments after a step of AdamW with gradients clipped to norm 1."""
    beta1, beta2, epsilon, decay = 0.9, 0.98, 1e-8, 0.1
    squares = jax.tree.map(lambda g: jnp.sum(g * g), grads)
    norm = jnp.sqrt(jax.tree.reduce(jnp.add, squares))
    grads = jax.tree.map(lambda g: g * jnp.minimum(1, 1 / (norm + 1e-6)), grads)
    first = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, moments[0], grads)
    second = jax.tree.map(lambda m, g: beta2 * m + (1 - beta2) * g * g, moments[1], grads)
    count = (step + 1).astype(jnp.float32)
    unbias1, unbias2 = 1 - beta1**count, 1 - beta2**count

    def update(path: Any, p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        change = (m / unbias1) / (jnp.sqrt(v / unbias2) + epsilon)
        return p - rate * (change + (0.0 if is_norm(path) else decay) * p)

    return jax.tree.map_with_path(update, params, first, second), (first, second)


def make_train_calls(args: argparse.Namespace, corpus: jax.Array, lines: jax.Array) -> Any:
    """Returns a jitted function that runs several steps, all on the device."""

    def sample(key: jax.Array) -> jax.Array:
        starts = lines[jax.random.randint(key, (args.batch,), 0, lines.size)]
        take = jax.vmap(lambda start: lax.dynamic_slice(corpus, (start,), (args.context,)))
        return take(starts).astype(jnp.int32)

    def step(state: Any, index: jax.Array) -> Any:
        params, moments = state
        targets = sample(jax.random.fold_in(jax.random.key(args.seed), index))
        loss, grads = jax.value_and_grad(loss_of)(params, targets, args.attention)
        rate = learning_rate(index, args.lr, args.steps)
        return adamw(params, grads, moments, index, rate), loss

    return jax.jit(lambda state, steps: lax.scan(step, state, steps), donate_argnums=0)


def validate(params: Params, args: argparse.Namespace, held_out: np.ndarray) -> float:
    """Returns the loss over held-out files, cut into contexts."""
    rows = held_out[: held_out.size // args.context * args.context].reshape(-1, args.context)
    loss = jax.jit(loss_of, static_argnames="attention")
    total = 0.0
    for start in range(0, len(rows), args.batch):
        batch = jnp.asarray(rows[start : start + args.batch], jnp.int32)
        total += float(loss(params, batch, args.attention)) * len(batch)
    return total / len(rows)


def main() -> None:
    """Trains, prints the losses and writes the checkpoint."""
    parser = argparse.ArgumentParser(description="Trains a byte model on Python's own sources.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32, help="contexts of a step")
    parser.add_argument("--context", type=int, default=CONFIG.context, help="bytes of a context")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attention", choices=["xla", "cudnn"], default="xla")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    args = parser.parse_args()

    train, held_out = read_sources()
    # Only lines that a whole context follows; the first line has a start too.
    lines = np.append(0, np.flatnonzero(train == ord("\n")) + 1).astype(np.int32)
    lines = lines[lines <= train.size - args.context]
    if not lines.size or held_out.size < args.context:
        raise ValueError(f"--context {args.context} is longer than the sources that were found.")
    device = jax.devices()[0].device_kind
    print(f"{train.size:,} bytes to train on, {held_out.size:,} held out, device {device}")

    init = jax.jit(init_params, static_argnames="config")
    params = init(jax.random.key(args.seed), config=CONFIG)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = (params, (zeros, jax.tree.map(jnp.zeros_like, params)))
    run = make_train_calls(args, jnp.asarray(train), jnp.asarray(lines))
    start = time.perf_counter()
    loss = float("nan")
    with tqdm.tqdm(total=args.steps, unit="step", mininterval=1) as progress:
        for first in range(0, args.steps, STEPS_PER_CALL):
            steps = np.arange(first, min(first + STEPS_PER_CALL, args.steps), dtype=np.int32)
            state, losses = run(state, steps)
            loss = float(losses.mean())
            progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
            progress.update(len(steps))
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), state[0])  # What is saved is scored.
    seconds = time.perf_counter() - start
    held_out_loss = validate(params, args, held_out)
    checkpoint.save(args.out, dataclasses.replace(CONFIG, context=args.context), params)
    record = {
        "command": "python examples/train_lm.py",
        "arguments": {name: value for name, value in vars(args).items() if name != "out"},
        "data": f"*.py of the standard library of Python {platform.python_version()}",
        "train_bytes": train.size,
        "validation_bytes": held_out.size,
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "device": device,
        "jax": jax.__version__,
        "seconds": round(seconds, 1),
        "train_loss": round(loss, 4),
        "validation_loss": round(held_out_loss, 4),
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{seconds:.0f} s; loss (nats per byte): {loss:.4f} train, {held_out_loss:.4f} held out")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
