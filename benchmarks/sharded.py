# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Times one decoding step of attention on 1, 2, 4 ... devices, and what crosses them.

    python benchmarks/sharded.py [--json FILE] [--quick]

Each case is timed with its contexts sharded, whose parts are merged, with its kv heads sharded,
and with its contexts sharded but not merged: what that saves is the time of the collectives. Steps
follow each other in one compiled program, so dispatch is not timed. Results are compared with those
of one device before anything is timed.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import device as device_lib
import jax
import jax.numpy as jnp
import numpy as np
import run
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_attn

# How keys and queries are sharded, and whether the results of devices are merged.
ARRANGEMENTS = {
    "heads": (P(None, None, "x"), P(None, None, "x"), None),
    "contexts": (P(None, "x"), P(), "x"),
    "not merged": (P(None, "x"), P(), None),
}
DTYPE = jnp.bfloat16
STEPS, SAMPLES = 16, 9


@dataclasses.dataclass(frozen=True)
class Case:
    """A decoding step: one query token for each context."""

    batch: int
    kv_len: int
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        kv = self.batch * self.kv_len * self.num_kv_heads * self.head_dim
        return 2 * kv * jnp.dtype(DTYPE).itemsize

    @property
    def name(self) -> str:
        """Sizes: batch, query heads, kv heads, keys, head_dim."""
        sizes = (self.batch, self.num_q_heads, self.num_kv_heads, self.kv_len, self.head_dim)
        return "x".join(map(str, sizes))


CASES = (Case(1, 1 << 20), Case(16, 1 << 16), Case(1, 1 << 17))
QUICK_CASES = (Case(2, 1 << 10),)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description="Times attention on several devices.")
    parser.add_argument("--json", help="write results to this file")
    parser.add_argument("--quick", action="store_true", help="a small case on two devices")
    arguments = parser.parse_args(argv)
    header = run.describe(device_lib.Device.default())
    run.print_header(header)
    cases, most = (QUICK_CASES, 2) if arguments.quick else (CASES, jax.device_count())
    rows = [row for case in cases for row in measure(case, most)]
    if arguments.json:
        report = {"header": header | {"quick": arguments.quick}, "results": rows}
        pathlib.Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    return int(any(not row["error"] < run.TOLERANCE["bfloat16"] for row in rows))


def measure(case: Case, most: int) -> list[dict[str, Any]]:
    """Times a case on 1, 2, 4 ... devices, and prints its table."""
    print(f"\n{case.name}: {case.num_bytes / 1e6:.1f} MB")
    columns = ("median us", "min", "max", "GB/s", "speed-up", "error")
    print(f"  {'':<22}" + "".join(f"{column:>11}" for column in columns))
    rows: list[dict[str, Any]] = []
    expected: np.ndarray | None = None
    alone = float("nan")
    counts = [n for n in (1, 2, 4, 8) if n <= most]
    for count in counts:
        mesh = jax.make_mesh((count,), ("x",), devices=jax.devices()[:count])
        for name, (keys, queries, merged_over) in ARRANGEMENTS.items():
            if count == 1 and name != "heads":
                continue  # all the same
            query, key, value = inputs(case, mesh, queries, keys)
            step, many = (
                jax.jit(
                    jax.shard_map(
                        functools.partial(attend, steps=steps, axis_name=merged_over),
                        mesh=mesh,
                        in_specs=(queries, keys, keys),
                        out_specs=P("x") if name == "not merged" else queries,
                        check_vma=name != "not merged",
                    )
                )
                for steps in (1, STEPS)
            )
            error = 0.0
            if name != "not merged":
                out = np.asarray(step(query, key, value), np.float32)
                expected = out if expected is None else expected
                error = run.relative_error(out, expected)
            samples = time_steps(functools.partial(many, query, key, value))
            median = float(np.median(samples))
            alone = median if count == 1 else alone
            rows.append(
                {
                    "case": case.name,
                    "devices": count,
                    "arrangement": name,
                    "median_us": 1e6 * median,
                    "min_us": 1e6 * min(samples),
                    "max_us": 1e6 * max(samples),
                    "speed_up": alone / median,
                    "error": error,
                }
            )
            print_row(rows[-1], case.num_bytes / median / 1e9)
    return rows


def print_row(row: dict[str, Any], rate: float) -> None:
    """Prints a row of the table of a case."""
    title = f"{row['devices']} x" + (f" {row['arrangement']}" if row["devices"] > 1 else "")
    cells = [f"{row[name]:.1f}" for name in ("median_us", "min_us", "max_us")]
    cells += [f"{rate:.0f}", f"{row['speed_up']:.2f}x", f"{row['error']:.1e}"]
    print(f"  {title:<22}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


def inputs(case: Case, mesh: Mesh, queries: P, keys: P) -> tuple[jax.Array, ...]:
    """Makes a query, keys and values where they are to be; the same ones on any mesh."""
    c = case
    shapes = {
        "query": (c.batch, 1, c.num_q_heads, c.head_dim),
        "key": (c.batch, c.kv_len, c.num_kv_heads, c.head_dim),
        "value": (c.batch, c.kv_len, c.num_kv_heads, c.head_dim),
    }

    def make() -> tuple[jax.Array, ...]:
        random = zip(jax.random.split(jax.random.key(0), 3), shapes.values(), strict=True)
        return tuple(jax.random.normal(key, shape, DTYPE) for key, shape in random)

    places = tuple(NamedSharding(mesh, spec) for spec in (queries, keys, keys))
    return jax.jit(make, out_shardings=places)()


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, steps: int, axis_name: str | None
) -> jax.Array:
    """Attends with a query, and then with what it returned, on the shards of a device."""

    def step(_: int, query: jax.Array) -> jax.Array:
        return jax_attn.split_kv_attention(query, key, value, axis_name=axis_name)

    return jax.lax.fori_loop(0, steps, step, query)


def time_steps(many: Callable[[], jax.Array]) -> list[float]:
    """Seconds of a step, in samples of many."""
    many().block_until_ready()
    samples = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        many().block_until_ready()
        samples.append((time.perf_counter() - start) / STEPS)
    return samples


if __name__ == "__main__":
    raise SystemExit(main())
