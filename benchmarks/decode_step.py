# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Times a decoding step of a whole model, with the compiled kernels and with XLA's operations.

    python benchmarks/decode_step.py [--json FILE] [--quick]

A step is one jitted call: embedding, all layers, logits, and the best token, with a donated paged
cache, as in `examples/generate.py`. The model has the sizes of Qwen3-0.6B and random parameters.
On a GPU the kernels of a step are counted and their times added up from a profile: what the calls
of this package launch, matrix products, and the rest.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import device as device_lib
import jax
import jax.numpy as jnp
import numpy as np
import run

import jax_attn

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "examples"))

import generate
import model as model_lib

QWEN3 = model_lib.ModelConfig(
    vocab_size=151936,
    hidden_size=1024,
    mlp_size=3072,
    num_layers=28,
    num_q_heads=16,
    num_kv_heads=8,
    head_dim=128,
    context=40960,
    rope_theta=1e6,
)
QUICK = dataclasses.replace(
    QWEN3, vocab_size=256, hidden_size=64, mlp_size=64, num_layers=2, num_q_heads=2, num_kv_heads=1
)
# Sequences and tokens of each context.
SIZES = ((1, 4096), (32, 4096))
QUICK_SIZES = ((2, 64),)
STEPS, SAMPLES, PROFILED_STEPS = 20, 7, 4
IMPLEMENTATIONS = {"jax_attn": None, "XLA": "xla"}
# In names of kernels: cuBLAS and Triton call matrix products so.
MATRIX_PRODUCTS = ("gemm", "gemv", "nvjet", "cutlass", "splitk")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Times a decoding step of a model.")
    parser.add_argument("--json", help="write results to this file")
    parser.add_argument("--quick", action="store_true", help="a small model")
    arguments = parser.parse_args(argv)
    device = device_lib.Device.default()
    header = run.describe(device)
    run.print_header(header)
    config, sizes = (QUICK, QUICK_SIZES) if arguments.quick else (QWEN3, SIZES)
    rows = []
    for batch, length in sizes:
        print(f"\n{batch} contexts of {length} tokens, {config.num_layers} layers")
        for name, implementation in IMPLEMENTATIONS.items():
            step = Step(config, batch, length, implementation)
            seconds = step.time()
            kernels = step.kernels() if device.platform == "gpu" else {}
            rows.append(
                {
                    "batch": batch,
                    "kv_len": length,
                    "layers": config.num_layers,
                    "implementation": name,
                    "median_us": 1e6 * float(np.median(seconds)),
                    "min_us": 1e6 * min(seconds),
                    "kernels": kernels,
                }
            )
            print_row(rows[-1])
    if arguments.json:
        report = {"header": header | {"quick": arguments.quick}, "results": rows}
        pathlib.Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


class Step:
    """A jitted decoding step and its state, of full contexts."""

    def __init__(
        self, config: model_lib.ModelConfig, batch: int, length: int, implementation: str | None
    ):
        c = config
        pages = -(-(length + SAMPLES * STEPS + STEPS) // generate.PAGE_SIZE)
        shape = (c.num_layers, batch * pages, generate.PAGE_SIZE, c.num_kv_heads, c.head_dim)
        self._params = jax.jit(
            lambda key: jax.tree.map(
                lambda x: x.astype(jnp.bfloat16), model_lib.init_params(key, config)
            )
        )(jax.random.key(0))
        self._cache = jax_attn.PagedKVCache(*[jnp.ones(shape, jnp.bfloat16) for _ in range(2)])
        ids = np.random.default_rng(0).permutation(batch * pages)
        self._page_table = jnp.asarray(ids.reshape(batch, pages), jnp.int32)
        self._lengths = jnp.full((batch,), length, jnp.int32)
        self._tokens = jnp.zeros((batch,), jnp.int32)
        self._rope = model_lib.make_rope(config, pages * generate.PAGE_SIZE)
        options = generate.Options(
            config, implementation=implementation, qkv_implementation=implementation
        )

        def step(model: Any, tokens: Any, cache: Any, table: Any, lengths: Any, key: Any) -> Any:
            tokens, _, cache = generate.next_tokens(
                model, tokens[:, None], cache, table, lengths, key, options
            )
            return tokens, cache, lengths + 1

        self._step: Callable[..., Any] = jax.jit(step, donate_argnums=2)

    def run(self, count: int) -> None:
        """Does some steps, each with the token that the last one chose."""
        key = jax.random.key(0)
        model = generate.Model(self._params, self._rope)
        for _ in range(count):
            self._tokens, self._cache, self._lengths = self._step(
                model, self._tokens, self._cache, self._page_table, self._lengths, key
            )
        self._tokens.block_until_ready()

    def time(self) -> list[float]:
        """Seconds of a step, in samples of many that are queued."""
        self.run(3)
        start_lengths, samples = self._lengths, []
        for _ in range(SAMPLES):
            self._lengths = start_lengths
            start = time.perf_counter()
            self.run(STEPS)
            samples.append((time.perf_counter() - start) / STEPS)
        return samples

    def kernels(self) -> dict[str, Any]:
        """Launches, and microseconds on the device, of a step by kind of kernel."""
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                self.run(PROFILED_STEPS)
            (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
            profile = jax.profiler.ProfileData.from_file(str(path))
        spans: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
        for plane in profile.planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        span = (event.start_ns, event.start_ns + event.duration_ns)
                        spans[kind_of(event.name)].append(span)
        return {
            kind: {
                "launches": len(spans[kind]) / PROFILED_STEPS,
                "us": covered(spans[kind]) / 1e3 / PROFILED_STEPS,
            }
            for kind in sorted(spans)
        }


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans: a kernel may start before the one that it waits for ends."""
    total, end = 0.0, 0.0
    for first, last in sorted(spans):
        total += max(last, end) - max(first, end)
        end = max(last, end)
    return total


def kind_of(kernel: str) -> str:
    """What a kernel is for, by its name."""
    name = kernel.lower()
    if "jax_attn" in name:
        return "fused QKV" if "fused" in name or "qkv" in name else "attention"
    if "memcpy" in name or "memset" in name:
        return "copies"
    return "matrix products" if any(part in name for part in MATRIX_PRODUCTS) else "other"


def print_row(row: dict[str, Any]) -> None:
    """Prints the time of a step, and where it goes."""
    print(f"  {row['implementation']:<10}{row['median_us']:>10.1f} us a step", flush=True)
    for kind, found in row["kernels"].items():
        per_layer = found["launches"] / row["layers"]
        print(
            f"    {kind:<18}{found['launches']:>8.1f} launches, {per_layer:.1f} a layer"
            f"{found['us']:>10.1f} us"
        )


if __name__ == "__main__":
    raise SystemExit(main())
