# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Plans of GPU kernels for a Hopper device, which need no GPU."""

import pathlib
import platform
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
COMPILER = shutil.which("c++") or ""

pytestmark = pytest.mark.skipif(
    not COMPILER or not (ROOT / "csrc").is_dir() or platform.machine() != "x86_64",
    reason="needs a C++ compiler, the sources, and a processor that can stand in for a GPU",
)


def test_shares(tmp_path):
    program = tmp_path / "test"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror"]
    stand_in = ["-DJAX_ATTN_GPU_ON_CPU", "-D__HIP_PLATFORM_AMD__", "-D__GFX9__"]
    include = f"-I{ROOT / 'tests' / 'gpu_on_cpu'}"
    files = [ROOT / "tests/native/gpu_split_plan_test.cc", ROOT / "csrc/gpu/split_plan.cc"]
    subprocess.run([COMPILER, *flags, *stand_in, include, *files, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("plans: ")
