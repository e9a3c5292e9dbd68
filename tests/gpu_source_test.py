# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The sources of the GPU kernels, run on the CPU as on AMD GPUs of three kinds (.ci/gpu_on_cpu).

The operations' own tests, with the kernels of csrc/gpu in the place of the CPU's: wave64 with MFMA
(gfx9), wave32 with the WMMA of gfx11 and of gfx12.
"""

import importlib.machinery
import importlib.util
import pathlib

import fuzz_test
import jax
import numpy as np
import pytest
import support
from split_kv_attention_test import (  # noqa: F401 - collected here too
    test_any_number_of_splits_gives_the_same_result,
    test_bias_of_minus_infinity_hides_keys,
    test_dtype,
    test_every_argument_has_an_effect,
    test_every_stored_byte_means_its_number,
    test_extreme_sinks,
    test_feature,
    test_first_and_last_layer,
    test_group_of_query_heads,
    test_head_dim,
    test_length_around_a_page,
    test_lengths_are_clipped_to_the_buffer,
    test_nan_that_is_seen_is_not_hidden,
    test_page_ids_outside_the_pool_are_clipped,
    test_query_len,
    test_repeated_calls_give_the_same_bits,
    test_scale_of_each_layer,
    test_scale_shape,
    test_split_size_makes_a_sequence_independent_of_its_batch,
    test_straggler_does_not_disturb_its_batch,
    test_what_is_not_seen_cannot_change_the_result,
    test_zero_sizes,
)

from jax_attn._src import registration
from jax_attn._src.fused_qkv_rope_cache import primitive as fused_qkv
from jax_attn._src.small_seq_attention import primitive as small_seq
from jax_attn._src.split_kv_attention import primitive

OPERATIONS = (
    primitive.operation,
    fused_qkv.operation,
    small_seq.operation,
    small_seq.gradient_operation,
)


@pytest.fixture(scope="module", params=["gfx9", "gfx11", "gfx12"])
def architecture(request):
    """Puts the kernels of an architecture where those of the CPU are."""
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    library = pathlib.Path(request.config.getoption("gpu_on_cpu"), request.param, "_rocm" + suffix)
    if not library.exists():
        pytest.skip(f"there is no {library}; .ci/gpu_on_cpu builds it")
    with pytest.MonkeyPatch.context() as patch:
        module, native_module = loaded(library, request.param), registration.native_module
        patch.setattr(
            registration, "native_module", lambda p: module if p == "rocm" else native_module(p)
        )
        for operation in OPERATIONS:
            patch.setitem(operation._kernels, "cpu", renamed(operation, request.param))
        jax.clear_caches()
        yield request.param
    jax.clear_caches()


def loaded(library, architecture):
    """The module of an architecture, its handlers registered as `<target>_<architecture>`."""
    spec = importlib.util.spec_from_file_location("_rocm", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for target, handler in module.handlers().items():
        jax.ffi.register_ffi_target(f"{target}_{architecture}", handler, platform="cpu")
    return module


def renamed(operation, architecture):
    kernel = operation._kernels["rocm"]

    def call(*args):
        found = kernel(*args)
        return found if isinstance(found, str) else (f"{found[0]}_{architecture}", *found[1:])

    return call


@pytest.fixture
def implementation(architecture):
    return "native"


def sizes(variant, cache_dtype):
    """Head sizes and query rows for all kernels of a variant and a type."""
    cases = [(64, 3), (128, 24), (192, 24), (512, 3)]
    return cases[:-1] if variant == "matrix" and cache_dtype in support.QUANTIZED else cases


@pytest.mark.parametrize(
    "variant, cache_dtype, head_dim, rows",
    [
        (variant, dtype, *size)
        for variant in ("matrix", "vector")
        for dtype in ("bfloat16", "float16", *support.QUANTIZED)
        for size in sizes(variant, dtype)
    ],
)
def test_variant(architecture, variant, cache_dtype, head_dim, rows, monkeypatch):
    support.use_variant(variant, monkeypatch)
    problem = support.dense(
        np.random.default_rng(head_dim),
        num_q_heads=2 * rows,
        head_dim=head_dim,
        kv_len=97,
        dtype="float16" if cache_dtype == "float16" else "bfloat16",
        cache_dtype=cache_dtype,
        lengths=[97, 38],
    )
    if variant == "matrix" and head_dim > 128 and architecture != "gfx9":
        # Waves of 32 have too few registers.
        with pytest.raises(jax.errors.JaxRuntimeError, match="variant 'matrix' cannot run here"):
            problem.run("native")
        return
    problem.check("native")


@pytest.mark.parametrize("seed", range(20))
def test_random_problem(implementation, seed):
    fuzz_test.random_problem(seed).check(implementation)
