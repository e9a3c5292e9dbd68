# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Concurrent calls: no deadlock, right results, the same bits. Run in a process of its own."""

import concurrent.futures
import functools
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_attn

DEVICES = 8
THREADS = 6
SECONDS = 5
TIMEOUT = 120  # of a process that should be done in a fraction of it


@pytest.mark.skipif(
    "cpu" not in jax_attn.platforms(), reason="this build of jax_attn has no kernels for the CPU"
)
def test_concurrent_calls():
    # The number of devices must be known before anything asks for them, as imports below do.
    program = (
        f"import jax; jax.config.update('jax_num_cpu_devices', {DEVICES}); "
        "import threading_test; threading_test.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=pathlib.Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rounds" in done.stdout


def problems():
    """Problems that are large enough for several threads, of different shapes and splits."""
    rng = np.random.default_rng(0)
    shared = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64, "query_len": 1}
    return [
        support.dense(rng, kv_len=1536, lengths=[1536, 700], **shared),
        support.dense(rng, kv_len=1024, num_splits=5, dtype="bfloat16", **shared),
        support.dense(rng, kv_len=1024, split_size=96, sinks=True, **shared),
        support.paged(
            support.dense(rng, kv_len=1024, lengths=[1000, 1024], cache_dtype="int8", **shared),
            rng,
            page_size=16,
        ),
    ]


def attend(arrays, layout, options):
    options = {**options, "return_lse": True, "implementation": "native"}
    return support.call(arrays, layout, **options)


def bits(results):
    return [np.asarray(x).tobytes() for x in results]


def callers(problem, devices):
    """Ways to compute a problem, each a function without arguments that returns its results."""
    call = functools.partial(attend, layout=problem.layout, options=problem.options)
    jitted = jax.jit(call)
    nested = jax.jit(lambda x: jax.jit(call)(x))
    scanned = jax.jit(lambda x: jax.lax.scan(lambda _, i: (_, call(x)), 0, jnp.arange(2))[1])
    copies = [
        {name: jax.device_put(array, device) for name, array in problem.arrays.items()}
        for device in devices
    ]

    def on_all_devices():
        results = [jitted(copy) for copy in copies]  # dispatched before any is waited for
        first, *rest = map(bits, results)
        assert all(each == first for each in rest)
        return results[-1]

    mesh = jax.make_mesh((len(devices),), ("device",), (AxisType.Auto,), devices=devices)
    stacked = {name: np.stack([array] * len(devices)) for name, array in problem.arrays.items()}

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("device"), out_specs=P("device"))
    def sharded(shards):
        # The sum makes the devices wait for each other between two calls.
        arrays = {name: shard[0] for name, shard in shards.items()}
        zero = 0 * jax.lax.psum(jnp.sum(call(arrays)[1]), "device")
        arrays["query"] += zero.astype(arrays["query"].dtype)
        return jax.tree.map(lambda x: x[None], call(arrays))

    def all_shards():
        results = [np.asarray(x) for x in sharded(stacked)]
        assert all((x == x[:1]).all() for x in results)
        return [x[0] for x in results]

    return [
        lambda: call(copies[0]),
        lambda: jitted(copies[1]),
        lambda: nested(copies[2]),
        lambda: [x[1] for x in scanned(copies[3])],
        on_all_devices,
        all_shards,
    ]


def main():
    devices = jax.devices()
    assert len(devices) == DEVICES
    work = []
    for problem in problems():
        expected = problem.solve()
        calls = callers(problem, devices)
        out, lse = map(np.asarray, calls[0]())
        support.assert_close(out, lse, expected, problem.query.dtype)
        work += [(each, bits((out, lse))) for each in calls]
    for each, expected in work:  # compiles, one at a time
        assert bits(each()) == expected

    deadline = time.monotonic() + SECONDS

    def repeat(seed):
        rng = np.random.default_rng(seed)
        rounds = 0
        while time.monotonic() < deadline:
            for i in rng.permutation(len(work)):
                each, expected = work[i]
                assert bits(each()) == expected
                if time.monotonic() > deadline:
                    break
            rounds += 1
        return rounds

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        print(sum(pool.map(repeat, range(THREADS))), "rounds")
