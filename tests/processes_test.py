# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Contexts sharded over the devices of two processes, which talk over the loopback interface."""

import functools
import socket
import subprocess
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

NUM_PROCESSES, DEVICES_EACH = 2, 2


def main(coordinator, process):
    """One process: values and gradients are those of one device."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES_EACH)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, NUM_PROCESSES, int(process))
    import context_sharding_test as contexts

    x, names = contexts.choose("dense", *contexts.ALIBI)
    mesh = contexts.mesh_of("auto", (NUM_PROCESSES, DEVICES_EACH, 1))
    wanted = contexts.specs("dense", ("x", "y"))
    placed = {
        name: jax.make_array_from_callback(
            a.shape, NamedSharding(mesh, wanted[name]), lambda index, a=a: a[index]
        )
        for name, a in x.items()
    }
    run = contexts.everything(functools.partial(contexts.attend, **contexts.WINDOW))
    replicated = jax.jit(run, out_shardings=NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        actual = jax.tree.map(np.asarray, replicated(placed))
    contexts.check(actual, names, "dense", contexts.WINDOW)
    print("all agree")


def test_values_and_gradients():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    command = [sys.executable, __file__, coordinator]
    running = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for i in range(NUM_PROCESSES)
    ]
    try:
        for process in running:
            out, error = process.communicate(timeout=120)
            assert process.returncode == 0, error.decode()
            assert out.endswith(b"all agree\n")
    finally:
        for process in running:
            process.kill()


if __name__ == "__main__":
    main(*sys.argv[1:])
