# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Contexts, pages and heads sharded over all GPUs, as one GPU has them whole."""

import functools

import context_sharding_test as contexts
import jax
import numpy as np
import pytest
import support
from jax.sharding import AxisType

import jax_attn

COUNT = jax.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        support.PLATFORM == "cpu" or support.PLATFORM not in jax_attn.platforms() or COUNT < 2,
        reason="fewer than two GPUs that this build of jax_attn has kernels for",
    ),
]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("layout", "axes", "options", "left_out"),
    [
        ("dense", {"context": "x"}, contexts.WINDOW, contexts.BIAS),
        ("dense", {"context": "x"}, contexts.TOP_LEFT, contexts.ALIBI),
        ("dense", {"heads": "x"}, contexts.PLAIN, ("kv_lengths", *contexts.BIAS)),
        ("dense", {"batch": "x"}, contexts.LAST, contexts.ALIBI),
        ("paged", {"context": "x"}, contexts.WINDOW, contexts.ALIBI),
        ("paged", {"pages": "x"}, contexts.LAST, contexts.ALIBI),
        ("paged", {"heads": "x"}, contexts.TOP_LEFT, contexts.BIAS),
    ],
)
def test_several_devices_are_as_one(kind, layout, axes, options, left_out):
    if contexts.BATCH % COUNT or ("heads" in axes and contexts.KV_HEADS % COUNT):
        pytest.skip(f"{COUNT} devices do not divide the problem")
    x, names = contexts.choose(layout, *left_out)
    mesh = jax.make_mesh((COUNT,), ("x",), axis_types=(kind,))
    specs = contexts.specs(layout, **{"context": None} | axes)
    run = contexts.everything(functools.partial(contexts.attend, **options))
    with jax.default_matmul_precision("highest"):  # of gradients, which are jax.numpy here
        (gradients, (out, lse)) = contexts.expected(layout, names, tuple(options.items()))
        with jax.set_mesh(mesh):
            compiled = jax.jit(run).lower(contexts.place(x, mesh, specs)).compile()
            actual = compiled(contexts.place(x, mesh, specs))
    assert f'custom_call_target="{contexts.TARGET}"' in compiled.as_text()
    for name, a in {**actual[0], "out": actual[1][0], "lse": actual[1][1]}.items():
        b = {**gradients, "out": out, "lse": lse}[name]
        assert not np.isnan(b).any()
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4, err_msg=name)
