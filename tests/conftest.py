# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Settings of all tests: strict promotion, eight CPU devices, examples importable."""

import pathlib
import sys

import jax
import pytest

TESTS = pathlib.Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "examples")]

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)  # before anything starts the backend

import support  # noqa: E402  (found through the path above)


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=200, metavar="N", help="number of random problems")
    parser.addoption(
        "--gpu-on-cpu",
        default=TESTS.parent / "build" / "gpu_on_cpu",
        metavar="DIRECTORY",
        help="where .ci/gpu_on_cpu built the GPU kernels that run on the CPU",
    )


@pytest.fixture(params=support.IMPLEMENTATIONS)
def implementation(request):
    return request.param


@pytest.fixture(params=support.VARIANTS)
def variant(request, monkeypatch):
    """Runs a test with every variant of the CPU kernels that this machine has."""
    support.use_variant(request.param, monkeypatch)
    return request.param
