# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The example of generation on a mesh: on eight devices, and on those of two processes."""

import re

import generate_test
import pytest
import sharded_generate

byte_model = generate_test.byte_model
PROMPTS = ("x = 1", "def f(a):\n    return", "#" * 40, "import os, sys")


def command(byte_model, *arguments):
    return ["--model", str(byte_model), "--prompt", *PROMPTS, *arguments]


@pytest.mark.parametrize("mesh", [None, (1, 1, 8)], ids=str)
def test_same_tokens_as_one_device(mesh, byte_model, capsys):
    """Of a mesh with all axes, and of one whose last devices have empty parts of contexts."""
    arguments = [] if mesh is None else ["--mesh", *map(str, mesh)]
    assert sharded_generate.main(command(byte_model, "--tokens", "20", *arguments)) == 0
    out = capsys.readouterr().out
    data, heads, context = mesh or (2, 2, 2)
    assert f"mesh: data {data}, heads {heads}, context {context}; 1 process(es), cpu" in out
    assert "the mesh and one device chose the same tokens: 80 of 80" in out


def test_two_processes(byte_model, capfd):
    assert sharded_generate.main(command(byte_model, "--tokens", "3", "--processes", "2")) == 0
    assert "same tokens: 12 of 12" in capfd.readouterr().out


def test_a_process_that_fails_ends_all(byte_model, capfd):
    arguments = ["--model", str(byte_model / "nothing"), "--processes", "2"]
    assert sharded_generate.main(arguments) != 0
    assert "error" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mesh", "2", "2", "1"), r"--mesh \(2, 2, 1\) does not have 8 devices"),
        (("--mesh", "1", "4", "2"), "does not divide 4 prompts and 2 kv heads"),
        (("--mesh", "8", "1", "1"), "does not divide 4 prompts"),
        (("--processes", "3"), "--processes must divide 8"),
        (("--tokens", "0"), "--tokens must be positive"),
        (("--tokens", "100"), r"41 \+ 100 tokens do not fit a context of 128"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message, byte_model, capsys):
    with pytest.raises(SystemExit):
        sharded_generate.main(command(byte_model, "--tokens", "20", *arguments))
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("num_devices", "num_kv_heads", "shape"),
    [(8, 2, (2, 2, 2)), (8, 8, (1, 8, 1)), (4, 1, (2, 1, 2)), (1, 8, (1, 1, 1)), (6, 4, (3, 2, 1))],
)
def test_default_mesh(num_devices, num_kv_heads, shape):
    assert sharded_generate.default_mesh(num_devices, num_kv_heads) == shape
