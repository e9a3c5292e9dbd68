# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Generates text on a mesh of devices, and checks that it is what one device generates.

    python examples/sharded_generate.py
    python examples/sharded_generate.py --mesh 1 2 4
    python examples/sharded_generate.py --processes 2

The mesh has three axes: sequences are sharded over "data", heads and the width of MLPs over
"heads" (tensor parallelism), and every context over "context", where each device keeps the pages
of its part. All is in one `shard_map`, so what crosses devices is in sight: two sums of the
residual stream in each layer over "heads", and over "context" one maximum and one sum of the
attention's output, whatever the length of the contexts.

Without GPUs it runs on eight virtual CPU devices. With `--processes` these belong to several
processes, which talk over the loopback interface as hosts would over a network.
"""

import argparse
import functools
import math
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import checkpoint
import generate
import jax
import jax.numpy as jnp
import numpy as np
import tokenizer
from generate import CHUNK, PAGE_SIZE, Generated, Model, Options
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from model import MeshAxes, ModelConfig, Params, make_rope

import jax_attn

NUM_CPU_DEVICES = 8
AXES = ("data", "heads", "context")
POOL = P(None, ("data", "context"), None, "heads")
CACHE = jax_attn.PagedKVCache(POOL, POOL)  # type: ignore[arg-type]  # a tree of specs
# How the parameters of layers are sharded; the others are on every device.
PARAMS = {
    "qkv": P(None, None, "heads"),
    "attention_out": P(None, "heads"),
    "gate_up": P(None, None, "heads"),
    "down": P(None, "heads"),
}


def default_mesh(num_devices: int, num_kv_heads: int) -> tuple[int, int, int]:
    """Returns sizes of the axes that use all devices, as few as can be for sequences."""
    heads = math.gcd(num_devices, num_kv_heads)
    context = math.gcd(num_devices // heads, 2)
    return num_devices // heads // context, heads, context


def by_device(params: Params, config: ModelConfig, num_shards: int) -> Params:
    """Orders the columns of packed projections, so that equal parts are those of devices."""
    c = config
    sizes = np.array([c.num_q_heads, c.num_kv_heads, c.num_kv_heads]) * c.head_dim

    def shuffle(w: jax.Array, sizes: Sequence[int]) -> jax.Array:
        parts = np.split(np.asarray(w), np.cumsum(sizes)[:-1], axis=-1)
        shards = [np.split(part, num_shards, axis=-1) for part in parts]
        return np.concatenate([a for shard in zip(*shards, strict=True) for a in shard], axis=-1)

    layers = dict(params["layers"])
    layers["qkv"] = shuffle(layers["qkv"], sizes)
    layers["gate_up"] = shuffle(layers["gate_up"], [c.mlp_size, c.mlp_size])
    return {**params, "layers": layers}


def place(tree: Any, specs: Any, mesh: Mesh) -> Any:
    """Puts arrays that every process has on the devices of a mesh."""

    def put(spec: P, x: Any) -> jax.Array:
        x = np.asarray(x)
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    # `specs` is a prefix of the tree.
    return jax.tree.map(
        lambda spec, part: jax.tree.map(functools.partial(put, spec), part),
        specs,
        tree,
        is_leaf=lambda x: isinstance(x, P),
    )


def generate_on_mesh(
    model: Model, options: Options, prompts: Sequence[Sequence[int]], num_tokens: int, mesh: Mesh
) -> Generated:
    """Continues all prompts as one batch, with the best tokens; see `generate.generate`."""
    config = options.config
    data, heads, context = (mesh.shape[axis] for axis in AXES)
    batch = len(prompts)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    num_chunks = -(-(num_tokens - 1) // CHUNK)
    longest = int(generate.num_pages(lengths + num_chunks * CHUNK).max())
    pages = -(-longest // context)  # of a context, on one device
    page_table = np.full((batch, context * pages), -1, np.int32)
    # Each device has a pool and the page ids of its own.
    allocators = {
        (d, c): jax_attn.PageAllocator(batch // data * pages)
        for d in range(data)
        for c in range(context)
    }

    def reserve(lengths: np.ndarray) -> None:
        for (d, c), allocator in allocators.items():
            rows = slice(d * batch // data, (d + 1) * batch // data)
            own = np.clip(lengths[rows] - c * pages * PAGE_SIZE, 0, pages * PAGE_SIZE)
            part = page_table[rows, c * pages : (c + 1) * pages]
            generate.reserve_pages(allocator, part, own)

    local_config = ModelConfig(
        **{
            **vars(config),
            "num_q_heads": config.num_q_heads // heads,
            "num_kv_heads": config.num_kv_heads // heads,
        }
    )
    local_options = Options(local_config, axes=MeshAxes("heads", "context"))
    layers = {name: PARAMS.get(name, P()) for name in model.params["layers"]}
    model_specs = Model({**dict.fromkeys(model.params, P()), "layers": layers}, P())  # type: ignore
    rows, table = P("data"), P("data", "context")
    specs = (model_specs, rows, CACHE, table, rows, P())

    def on_mesh(function: Any) -> Any:
        sharded = jax.shard_map(
            functools.partial(function, options=local_options),
            mesh=mesh,
            in_specs=specs,
            out_specs=(rows, rows, CACHE),
        )
        # Tokens go to all devices, so that every process can read them.
        everywhere = NamedSharding(mesh, P())
        of_cache = jax.tree.map(lambda spec: NamedSharding(mesh, spec), CACHE, is_leaf=_is_spec)
        return jax.jit(sharded, donate_argnums=2, out_shardings=(everywhere, everywhere, of_cache))

    shape = (
        config.num_layers,
        sum(allocator.num_free for allocator in allocators.values()),
        PAGE_SIZE,
        config.num_kv_heads,
        config.head_dim,
    )
    dtype = model.params["embed"].dtype
    zeros = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=NamedSharding(mesh, POOL))
    cache = jax_attn.PagedKVCache(zeros(), zeros())
    params = by_device(model.params, config, heads)
    placed = place(Model(params, model.rope), model_specs, mesh)
    # For sampling, which is not done.
    key = jax.jit(lambda: jax.random.key(0), out_shardings=NamedSharding(mesh, P()))()

    padded = np.zeros((batch, lengths.max()), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt

    def arguments(tokens: np.ndarray) -> tuple[Any, ...]:
        host = place((tokens, page_table, lengths), (rows, table, rows), mesh)
        return placed, host[0], cache, *host[1:], key

    compiled = [
        on_mesh(function).lower(*arguments(tokens)).compile()
        for function, tokens in (
            (generate.next_tokens, padded),
            (generate.next_chunk, padded[:, 0]),
        )
    ]
    seconds = [0.0, 0.0]
    outputs: list[list[np.ndarray]] = [[], []]
    new = padded
    for step in range(1 + num_chunks):
        part = min(step, 1)
        # `lengths` are those of the cache, which the newest token is not in after the prefill.
        reserve(lengths + part * CHUNK)
        start = time.perf_counter()
        tokens, margins, cache = compiled[part](*arguments(new))
        outputs[0].append(np.asarray(tokens).reshape(batch, -1))
        outputs[1].append(np.asarray(margins).reshape(batch, -1))
        seconds[part] += time.perf_counter() - start
        lengths = lengths + part * CHUNK
        new = outputs[0][-1][:, -1]
    tokens, margins = (np.concatenate(parts, axis=1) for parts in outputs)
    count = tokens.size - batch
    return Generated(tokens[:, :num_tokens], margins[:, :num_tokens], count, *seconds)


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)


def start_processes(arguments: Sequence[str], count: int) -> int:
    """Runs this program as several processes; returns the first exit status that is not 0."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, *arguments, "--coordinator", f"localhost:{port}"]
    running = [subprocess.Popen([*command, "--process", str(i)]) for i in range(count)]
    try:
        # One that fails leaves the others waiting for it.
        while None in (states := [process.poll() for process in running]) and not any(states):
            time.sleep(0.1)
        return next((status for status in states if status), 0)
    finally:
        for process in running:
            process.kill()
            process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description="Generates text on a mesh of devices.")
    parser.add_argument("--model", type=pathlib.Path, default=generate.DEFAULT_MODEL, help="folder")
    parser.add_argument("--prompt", nargs="+", default=generate.PROMPTS, help="one or more texts")
    parser.add_argument("--tokens", type=int, default=100, help="to generate for each prompt")
    parser.add_argument("--dtype", choices=generate.DTYPES, default="float32", help="to compute in")
    parser.add_argument("--mesh", type=int, nargs=3, metavar=("D", "H", "C"), help=str(AXES))
    parser.add_argument("--processes", type=int, default=1, help="that share eight CPU devices")
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.processes > 1 and args.coordinator is None:
        if NUM_CPU_DEVICES % args.processes:
            parser.error(f"--processes must divide {NUM_CPU_DEVICES}")
        return start_processes(arguments, args.processes)
    num_cpu_devices = NUM_CPU_DEVICES // args.processes
    if jax.config.jax_num_cpu_devices != num_cpu_devices:
        jax.config.update("jax_num_cpu_devices", num_cpu_devices)
    if args.processes > 1:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(args.coordinator, args.processes, args.process)

    try:
        config, params = checkpoint.load(args.model, generate.DTYPES[args.dtype])
        words = tokenizer.load(args.model, config)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    prompts = [words.encode(text) for text in args.prompt]
    longest = max(len(prompt) for prompt in prompts)
    if min(len(prompt) for prompt in prompts) == 0 or args.tokens < 1:
        parser.error("prompts must not be empty, and --tokens must be positive")
    if longest + args.tokens > config.context:
        parser.error(f"{longest} + {args.tokens} tokens do not fit a context of {config.context}")
    shape = tuple(args.mesh or default_mesh(jax.device_count(), config.num_kv_heads))
    if min(shape) < 1 or math.prod(shape) != jax.device_count():
        parser.error(f"--mesh {shape} does not have {jax.device_count()} devices")
    if len(prompts) % shape[0] or config.num_kv_heads % shape[1] or config.mlp_size % shape[1]:
        parser.error(
            f"--mesh {shape} does not divide {len(prompts)} prompts and {config.num_kv_heads} kv "
            "heads"
        )

    mesh = jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    model = Model(params, make_rope(config, config.context))
    ours = generate_on_mesh(model, Options(config), prompts, args.tokens, mesh)
    if args.process:
        return 0
    one = generate.generate(model, Options(config), prompts, args.tokens)
    for text, row in zip(args.prompt, ours.tokens.tolist(), strict=True):
        print(text + words.decode(generate.until_end(row, words.end_tokens)))
        print("-" * 80)
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(f"mesh: {sizes}; {args.processes} process(es), {jax.devices()[0].device_kind}")
    for name, run in {"mesh": ours, "one device": one}.items():
        rate = run.num_decoded / run.decode_seconds if run.num_decoded else 0
        print(f"{name:12}{rate:8.0f} tokens/s decoding")
    problem = generate.first_disagreement(ours, one, generate.TIE[args.dtype])
    if problem:
        print(f"the mesh chose different tokens: {problem}", file=sys.stderr)
        return 1
    same = int((ours.tokens == one.tokens).sum())
    print(f"the mesh and one device chose the same tokens: {same} of {ours.tokens.size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
