# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Times attention of very short sequences: this package, its peers, and the machine's limits.

    python benchmarks/small_seq.py [--case REGEX] [--peer REGEX] [--json FILE] [--quick]

Names of cases end in what is timed: the forward pass, the backward pass by itself with what it
needs from the forward pass given (on CPUs), or both. The ceiling of a forward pass is a pass that
reads as many bytes, and of the others one that copies them, measured in turn with the
implementations. Results are compared with a float32 reference before anything is timed.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import device as device_lib
import jax
import jax.numpy as jnp
import numpy as np
import peers_torch
import run
from device import Device, Runner

import jax_attn


@dataclasses.dataclass(frozen=True)
class Case:
    """Cross attention of one query per sequence, or self attention of `query_len` queries."""

    batch: int
    kv_len: int
    head_dim: int
    direction: str = "forward"  # or "backward" or "both"
    num_heads: int = 16
    num_kv_heads: int = 16
    query_len: int = 1
    dtype: str = "bfloat16"
    packed: bool = False

    @property
    def name(self) -> str:
        """Such as `b2048_kv8_h128_forward`."""
        parts = [f"b{self.batch}", f"kv{self.kv_len}", f"h{self.head_dim}"]
        parts += [f"n{self.num_heads}"] * (self.num_heads != 16)
        parts += [f"k{self.num_kv_heads}"] * (self.num_kv_heads != self.num_heads)
        parts += [f"q{self.query_len}"] * (self.query_len > 1)
        parts += ["f32"] * (self.dtype == "float32") + ["packed"] * self.packed
        return "_".join([*parts, self.direction])

    @property
    def num_bytes(self) -> int:
        """Bytes that must move: each input once, each result once."""
        head = self.batch * self.head_dim * jnp.dtype(self.dtype).itemsize
        queries = self.query_len * self.num_heads * head
        keys = self.kv_len * self.num_kv_heads * head
        forward, backward = 2 * queries + 2 * keys, 3 * queries + 4 * keys
        return {"forward": forward, "backward": backward, "both": forward + backward}[
            self.direction
        ]


DIRECTIONS = ("forward", "backward", "both")
_TINY = Case(8, 4, 64, num_heads=4, num_kv_heads=4)
CASES = tuple(
    dataclasses.replace(case, direction=direction)
    for case in (
        *(
            Case(batch, kv_len, head_dim)
            for batch in (2048, 4000, 30720)
            for kv_len in (2, 4, 6, 8, 12, 16)
            for head_dim in (128, 256, 512)
        ),
        *(Case(2048, kv_len, 128, packed=True) for kv_len in (8, 16)),
        *(Case(2048, kv_len, 128, dtype="float32") for kv_len in (8, 16)),
        Case(2048, 8, 128, query_len=8),
        *(Case(2048, 16, 128, query_len=16, packed=packed) for packed in (False, True)),
        Case(4096, 4, 128, query_len=4, num_kv_heads=4),
        Case(30720, 8, 128, num_kv_heads=2),
        _TINY,
        dataclasses.replace(_TINY, num_kv_heads=2, query_len=3),
        dataclasses.replace(_TINY, packed=True),
    )
    for direction in DIRECTIONS
)
# What runs without being asked for, and in a room of this many bytes.
DEFAULT = r"^b2048_kv(2|8|16)_h128(_f32|_packed|_q8|_q16)?_"
MAX_BYTES = 3 << 30


@functools.partial(jax.jit, static_argnums=0)
def make_inputs(case: Case, seed: int) -> tuple[jax.Array, ...]:
    """Random normal query, key, value and cotangent of the output; dense."""
    queries = (case.batch, case.query_len, case.num_heads, case.head_dim)
    keys = (case.batch, case.kv_len, case.num_kv_heads, case.head_dim)
    shapes = (queries, keys, keys, queries)
    random = jax.random.split(jax.random.key(seed), len(shapes))
    return tuple(
        jax.random.normal(k, shape, jnp.dtype(case.dtype))
        for k, shape in zip(random, shapes, strict=True)
    )


# ---- Implementations: functions of query, key and value


def ours(case: Case, implementation: str) -> Callable[..., jax.Array]:
    """This package; packed cases are the same sequences one after the other."""
    attend = functools.partial(jax_attn.small_seq_attention, implementation=implementation)
    if not case.packed:
        return attend
    lengths = {"query": case.query_len, "kv": case.kv_len}
    bounds = {
        f"{side}_cu_seqlens": jnp.arange(case.batch + 1, dtype=jnp.int32) * length
        for side, length in lengths.items()
    }
    hints = {"max_q_len": case.query_len, "max_kv_len": case.kv_len}

    def packed(*arrays: jax.Array) -> jax.Array:
        tokens = (x.reshape(-1, *x.shape[2:]) for x in arrays)
        return attend(*tokens, **bounds, **hints).reshape(arrays[0].shape)

    return packed


def jax_nn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`jax.nn.dot_product_attention`."""
    return jax.nn.dot_product_attention(query, key, value, implementation="xla")


def einsum(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Two einsums."""
    groups = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
    logits = jnp.einsum("btkgh,bskh->bkgts", groups, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * query.shape[-1] ** -0.5, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(query.shape)


def multiply(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Products and sums, which XLA's CPU compiler vectorises better in float32."""
    groups = query.reshape(*query.shape[:2], 1, key.shape[2], -1, query.shape[3])
    keys, values = (x[:, None, :, :, None] for x in (key, value))  # [B, 1, S, K, 1, H]
    q, k, v = (x.astype(jnp.float32) for x in (groups, keys, values))
    logits = jnp.sum(q * k, axis=-1) * query.shape[-1] ** -0.5  # [B, T, S, K, N / K]
    weights = jax.nn.softmax(logits, axis=2)
    return jnp.sum(weights[..., None] * v, axis=2).astype(query.dtype).reshape(query.shape)


JAX_PEERS: dict[str, Callable[[Case], Callable[..., jax.Array]]] = {
    "ours_native": lambda case: ours(case, "native"),
    "ours_xla": lambda case: ours(case, "xla"),
    "jax_nn": lambda case: jax_nn,
    "xla_einsum": lambda case: einsum,
    "xla_multiply": lambda case: multiply,
}
PEERS = (*JAX_PEERS, "torch")


def step_of(
    fn: Callable[..., jax.Array], direction: str, sets: Sequence[Sequence[jax.Array]]
) -> tuple[Callable[..., Any], list[tuple[Any, ...]]]:
    """What is timed, and its arguments for each input set."""

    def both(*arrays: jax.Array) -> Any:
        *operands, dout = arrays
        out, pull = jax.vjp(fn, *operands)
        return out, *pull(dout)

    def forward(*arrays: jax.Array) -> Any:
        return (fn(*arrays[:-1]),)

    if direction == "backward":
        linearize = jax.jit(functools.partial(jax.vjp, fn))
        return lambda pull, dout: pull(dout), [(linearize(*x[:-1])[1], x[-1]) for x in sets]
    return both if direction == "both" else forward, [tuple(x) for x in sets]


def jax_steps(
    fn: Callable[..., jax.Array], direction: str, sets: Sequence[Sequence[jax.Array]]
) -> list[Callable[[], Any]]:
    """Functions without arguments that do a step each, on one input set each.

    Each step gives its results' memory to the next, as a training loop does. Fresh memory would
    cost more than what is measured: the system clears every page of it.
    """
    step, given = step_of(fn, direction, sets)
    reusing = jax.jit(lambda old, *x: step(*x), donate_argnums=0, keep_unused=True)
    shapes = jax.eval_shape(step, *given[0])
    old = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    def call(x: Any) -> Any:
        nonlocal old
        old = reusing(old, *x)
        return old

    return [functools.partial(call, x) for x in given]


def feed(direction: str, x: Sequence[Any], results: Sequence[jax.Array]) -> tuple[Any, ...]:
    """The arguments `x` of a step with all results of another: XLA leaves out what nobody takes."""
    if direction == "forward":
        return (results[0], *x[1:])
    out, *gradients = results
    return (*gradients, out)


def torch_step(direction: str, x: Sequence[jax.Array]) -> Any:
    """PyTorch's scaled_dot_product_attention on the same memory."""
    import torch

    query, key, value, dout = (torch.from_dlpack(a).transpose(1, 2) for a in x)
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    if direction == "forward":
        return torch.no_grad()(lambda: attend(query, key, value).transpose(1, 2))
    leaves = [a.detach().requires_grad_() for a in (query, key, value)]

    def both() -> Any:
        out = attend(*leaves)
        return [a.detach().transpose(1, 2) for a in (out, *torch.autograd.grad(out, leaves, dout))]

    return both


def prepare(peer: str, case: Case, sets: Sequence[Any], device: Device) -> Runner:
    """An implementation that is ready to be timed; raises if it cannot do the case."""
    if peer == "torch":
        if not importlib.util.find_spec("torch"):
            raise NotImplementedError("package torch is not installed")
        if case.direction == "backward":
            raise NotImplementedError("its graph cannot be used twice")
        steps = [torch_step(case.direction, x) for x in sets]
        if device.platform == "gpu":
            return peers_torch.captured(steps, device_lib.calls_in_program(case.num_bytes))
        return Runner(steps, lambda out: None)
    if case.packed and not peer.startswith("ours"):
        raise NotImplementedError("no packed sequences")
    if device.platform == "gpu":
        if case.direction == "backward":
            raise NotImplementedError("timed with the forward pass, whose arguments it can feed")
        step, given = step_of(JAX_PEERS[peer](case), case.direction, sets)
        num_calls = device_lib.calls_in_program(case.num_bytes)
        return device_lib.jax_chain(
            lambda x: step(*x), given, functools.partial(feed, case.direction), num_calls
        )
    steps = jax_steps(JAX_PEERS[peer](case), case.direction, sets)
    return Runner(steps, jax.block_until_ready)


def results_of(out: Any) -> list[jax.Array]:
    """Arrays of JAX, whichever library made them."""
    arrays = out if isinstance(out, list | tuple) else [out]
    return [a if isinstance(a, jax.Array) else jnp.from_dlpack(a.contiguous()) for a in arrays]


def relative_error(found: jax.Array, expected: jax.Array) -> float:
    """Relative Frobenius error, found on the device; infinite for another shape or a NaN."""
    if found.shape != expected.shape:
        return float("inf")
    difference, norm = (np.sum(np.asarray(x, np.float64)) for x in _squares(found, expected))
    return float(np.sqrt(difference / norm)) if np.isfinite(difference) else float("inf")


@jax.jit
def _squares(found: jax.Array, expected: jax.Array) -> tuple[jax.Array, jax.Array]:
    # One sum for each sequence: float32 is too short for those of a large batch.
    axes = tuple(range(1, found.ndim))
    difference = found.astype(jnp.float32) - expected
    return jnp.sum(difference**2, axes), jnp.sum(expected**2, axes)


def measure(case: Case, peers: Sequence[str], device: Device, quick: bool) -> list[dict[str, Any]]:
    """Checks and times the implementations of a case, and returns a row for each."""
    num_sets = device.num_sets(case.num_bytes, case.num_bytes)
    sets = device_lib.copies(make_inputs(case, 0), num_sets)
    exact = [x.astype(jnp.float32) for x in sets[0]]
    expected = results_of(jax_steps(multiply, case.direction, [exact])[0]())
    rows, runners = [], {}
    for peer in peers:
        row: dict[str, Any] = {
            **{"case": case.name, "peer": peer, "bytes": case.num_bytes, "dtype": case.dtype},
            "input_sets": num_sets,
        }
        rows.append(row)
        try:
            runner = prepare(peer, case, sets, device)
            out = runner.calls[0]()
            is_chain = device.platform == "gpu" and peer in JAX_PEERS
            found = results_of(out[0] if is_chain else out)
        except NotImplementedError as e:
            row |= {"status": "missing", "reason": str(e)}
            continue
        errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
        row["error"] = max(errors)
        # A gradient is made of results that were rounded before.
        if row["error"] > 2 * run.TOLERANCE[case.dtype]:
            row |= {"status": "wrong", "reason": f"relative error {row['error']:.1e}"}
            continue
        runners[peer], row["status"] = runner, "timed"
    turns, seconds = run.turns(device, quick)
    passes = device_lib.readers if case.direction == "forward" else device_lib.copiers
    ceilings = passes(device, case.num_bytes, num_sets)
    samples = device_lib.take_turns(runners | ceilings, device, turns, seconds)
    rates = {name: case.num_bytes / float(np.median(samples[name])) for name in ceilings}
    fastest = max(rates, key=lambda name: rates[name])
    for row in rows:
        if row["status"] == "timed":
            row |= run.statistics(
                samples[row["peer"]], case.num_bytes, rates[fastest], samples.get("ours_native")
            )
            row["ceiling_by"] = fastest
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 if an implementation was wrong."""
    parser = argparse.ArgumentParser(description="Times attention of very short sequences.")
    parser.add_argument("--case", default=DEFAULT, help="cases whose name contains this expression")
    parser.add_argument("--peer", default="", help="implementations, likewise")
    parser.add_argument("--json", help="write results to this file")
    parser.add_argument("--quick", action="store_true", help="few samples")
    arguments = parser.parse_args(argv)
    device = Device.default()
    header = run.describe(device)
    run.print_header(header)
    peers = [peer for peer in PEERS if re.search(arguments.peer, peer)]
    results: list[dict[str, Any]] = []
    for case in CASES:
        if not re.search(arguments.case, case.name):
            continue
        if device.platform == "cpu" and case.num_bytes > MAX_BYTES:
            print(f"\n{case.name}: {case.num_bytes / 1e9:.1f} GB, left out on a CPU")
            continue
        rows = measure(case, peers, device, arguments.quick)
        run.print_rows(f"{case.name}: {case.num_bytes / 1e6:.1f} MB", rows)
        results += rows
        if arguments.json:  # after each case, so that a run that is cut short leaves something
            report = {"header": header, "results": results}
            pathlib.Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    return int(any(row["status"] == "wrong" for row in results))


if __name__ == "__main__":
    raise SystemExit(main())
