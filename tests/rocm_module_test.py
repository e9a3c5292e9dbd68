# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The ROCm module without an AMD GPU, with and without a stand-in for libamdhip64 (.ci/amd)."""

import importlib.machinery
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

BUILD = pathlib.Path(__file__).parents[1] / "build"
MODULE = BUILD / "amd" / f"_rocm{importlib.machinery.EXTENSION_SUFFIXES[0]}"
PROGRAM = BUILD / "amd_launch"
LIBRARIES = BUILD / "rocm" / "lib"

pytestmark = pytest.mark.skipif(
    not MODULE.exists() or not PROGRAM.exists(),
    reason="the ROCm module was not built: .ci/amd",
)

# Plans a call, for which the module asks for the device, and says what it was told.
PLAN = """
import ctypes, importlib.util, sys
library = ctypes.CDLL(sys.argv[2]) if len(sys.argv) > 2 else None
spec = importlib.util.spec_from_file_location("_rocm", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert library is None or library.StandInKernels() == 0
plan = module.split_kv_plan(
    batch=1, query_len=1, num_q_heads=8, num_kv_heads=8, head_dim=64, v_head_dim=64, kv_len=1024,
    heads_first=False, num_splits=0, split_size=0,
)
print(plan["num_cores"], 0 if library is None else library.StandInKernels())
"""


def run_all(*command, **environment):
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout


def run(*command, **environment):
    return run_all(*command, **environment).split("\n")[0]


def test_module_needs_nothing_of_the_library():
    # What it takes from other libraries when it is loaded, or when a function is first called.
    symbols = run_all(shutil.which("readelf"), "--wide", "--dynamic", "--dyn-syms", MODULE)
    assert "PyInit__rocm" in symbols
    assert "amdhip64" not in symbols
    assert not [line for line in symbols.splitlines() if re.search(r"\b(__)?hip[A-Z]", line)]


def test_module_loads_and_plans_without_the_library():
    cores, kernels = run(sys.executable, "-c", PLAN, MODULE).split()
    assert (int(cores), int(kernels)) == (132, 0)


def test_module_binds_to_the_library_that_the_process_has():
    # It is on no path where it could be found, and is there under its name alone.
    library = LIBRARIES / "libamdhip64.so.7"
    cores, kernels = run(sys.executable, "-c", PLAN, MODULE, library).split()
    assert int(cores) == 64
    assert int(kernels) > 20


def test_launch_without_the_library_names_it():
    assert run(PROGRAM) == (
        "libamdhip64.so.7 or libamdhip64.so.6, of ROCm, is not loaded and cannot be found"
    )


def test_launch_finds_the_library():
    assert run(PROGRAM, LD_LIBRARY_PATH=str(LIBRARIES)) == "launched"
