# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels with matrix instructions, with tiles emulated: few machines have them."""

import pathlib
import platform
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
COMPILER = shutil.which("c++") or ""

pytestmark = pytest.mark.skipif(
    not COMPILER or not (ROOT / "csrc").is_dir() or platform.system() != "Linux",
    reason="needs a C++ compiler and the sources",
)


def run_emulated(tmp_path, sources, *arguments):
    """Compiles a test program with emulated tiles, runs it, and returns what it prints."""
    program = tmp_path / "test"
    # Vectors of 64 bytes are passed between functions of one file only, which -Wpsabi is about.
    flags = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    defines = ["-DJAX_ATTN_EMULATE_TILES", "-DJAX_ATTN_TARGET=portable"]
    files = [str(ROOT / source) for source in sources]
    subprocess.run([COMPILER, *flags, *defines, *files, "-o", str(program)], check=True)
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_products_of_tiles(tmp_path):
    printed = run_emulated(tmp_path, ["tests/native/tile_products_test.cc"])
    assert printed.startswith("products: ")


def test_kernel_with_tiles(tmp_path):
    names = ("split_kv_kernel", "split_kv_attention", "split_plan")
    sources = (*(f"csrc/cpu/{name}.cc" for name in names), "tests/native/split_kv_kernel_test.cc")
    printed = run_emulated(tmp_path, sources, "amx")
    assert printed.startswith("amx bfloat16 bfloat16: ")
