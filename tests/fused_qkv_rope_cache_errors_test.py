# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Fused QKV split, norm, rotation and cache write: every argument counts, and is checked."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import qkv_cases
from qkv_cases import Problem

from jax_attn._src.fused_qkv_rope_cache.api import fused_qkv_rope_cache
from jax_attn._src.kv_cache import PagedKVCache
from jax_attn._src.qk_norm import QKNorm
from jax_attn._src.rope import Rope


def test_no_argument_is_ignored():
    problem = Problem(
        tokens=4,
        slot_mapping=range(4),
        scale="head",
        layers=2,
        head_dims=(16, 16),
        norm="weight",
        rotary="first",
        positions="offsets",
        gate="blocked",
    )
    (qkv, cache, slots), keywords = problem.arguments()
    rope, norm = keywords["rope"], keywords["qk_norm"]
    replace = dataclasses.replace
    sections = replace(rope, mrope_sections=(1, 1, 0))
    three = jnp.stack([keywords["positions"], keywords["offsets"], keywords["positions"]])
    start = {
        "qkv": qkv,
        "cache": cache,
        "slot_mapping": slots,
        "num_q_heads": 4,
        "gate": "blocked",
        **keywords,
    }
    start["positions"] = jnp.arange(4, dtype=jnp.int32) + 2
    changes = [
        {"qkv": qkv + 1},
        {"slot_mapping": slots[::-1]},
        {"gate": "interleaved"},
        {"layer": 0},
        {"positions": start["positions"] + 1},
        {"offsets": keywords["offsets"] + 1},
        {"offsets": None},
        {"rope": None, "positions": None, "offsets": None},
        *({"rope": replace(rope, **{name: getattr(rope, name) + 1})} for name in ("cos", "sin")),
        *({"rope": replace(rope, **{name: True})} for name in ("interleaved", "nope_first")),
        {"rope": sections, "positions": three},
        {"rope": replace(rope, rotary_dim=2, table_width="full")},
        {"qk_norm": None},
        *(
            {"qk_norm": replace(norm, **{name: getattr(norm, name) + 1})}
            for name in ("q_weight", "k_weight", "epsilon", "weight_offset")
        ),
        {"qk_norm": replace(norm, normalize_v=True)},
        {"qk_norm": replace(norm, q_weight=None)},
        *(
            {"cache": replace(cache, **{name: getattr(cache, name) + 1})}
            for name in ("k_pages", "v_pages", "k_scale", "v_scale")
        ),
    ]
    start["cache"] = cache = replace(
        cache, k_pages=jnp.zeros_like(cache.k_pages), v_pages=jnp.zeros_like(cache.v_pages)
    )
    before = jax.tree.leaves(qkv_cases.compiled(**start))
    for change in changes:
        after = jax.tree.leaves(qkv_cases.compiled(**{**start, **change}))
        assert any(np.any(a != b) for a, b in zip(before, after, strict=True)), change.keys()


def _call(**changes):
    arguments = {
        "qkv": jnp.ones((3, 8 * 8)),
        "cache": PagedKVCache.zeros(2, 4, 2, 8, dtype=jnp.float32),
        "slot_mapping": jnp.arange(3, dtype=jnp.int32),
        "num_q_heads": 4,
        "positions": jnp.arange(3, dtype=jnp.int32),
        "rope": ROPE,
        "qk_norm": NORM,
        **changes,
    }
    return fused_qkv_rope_cache(**arguments)


ROPE = Rope(jnp.ones((5, 4)), jnp.ones((5, 4)))
NORM = QKNorm(jnp.ones(8), jnp.ones(8), 1e-6)
CACHE = PagedKVCache.zeros(2, 4, 2, 8, dtype=jnp.float32)
INT8 = PagedKVCache.zeros(2, 4, 2, 8, dtype=jnp.int8)
LAYERED = PagedKVCache.zeros(2, 4, 2, 8, num_layers=3, dtype=jnp.float32)
INTS = jnp.arange(3, dtype=jnp.int32)


def rope(**changes):
    return {"rope": dataclasses.replace(ROPE, **changes)}


def norm(**changes):
    return {"qk_norm": dataclasses.replace(NORM, **changes)}


def cache(**changes):
    return {"cache": dataclasses.replace(CACHE, **changes)}


def mrope(*sections, interleaved=False):
    return {
        **rope(mrope_sections=sections, mrope_interleaved=interleaved),
        "positions": jnp.zeros((3, 3), jnp.int32),
    }


ERRORS = [
    (TypeError, "`cache` must be a PagedKVCache, got tuple", {"cache": (1, 2)}),
    (ValueError, "cache.layout must be 'NHD' or 'HND', got 'DHN'", cache(layout="DHN")),
    (ValueError, "gate must be 'interleaved', 'blocked' or None, got True", {"gate": True}),
    (ValueError, "implementation must be 'native', 'xla' or None", {"implementation": "cuda"}),
    (TypeError, "num_q_heads must be int, got float", {"num_q_heads": 4.0}),
    (ValueError, "num_q_heads must be at least 1, got 0", {"num_q_heads": 0}),
    (TypeError, "`qkv` must be float32, bfloat16 or float16, got int32", {"qkv": INTS}),
    (TypeError, "`qkv` must be an array, got list", {"qkv": [1.0]}),
    (ValueError, "`qkv` must have shape [tokens, columns]", {"qkv": jnp.ones(3)}),
    (
        ValueError,
        "`qkv` has 64 columns (shape (3, 64)), expected 96: 64 of queries and gate, 16 of keys "
        "and 16 of values, for num_q_heads=4, num_kv_heads=2, head_dim=8 and v_head_dim=8.",
        {"gate": "blocked"},
    ),
    (ValueError, "expected 72: 40 of queries, 16 of keys", {"num_q_heads": 5}),
    (
        TypeError,
        "`cache.k_pages` must be float32, bfloat16, float16, int8, float8_e4m3fn, "
        "float8_e4m3fnuz or float8_e5m2, got int32",
        cache(k_pages=jnp.zeros((2, 4, 2, 8), jnp.int32)),
    ),
    (
        TypeError,
        "`cache.v_pages` must be float32, got bfloat16",
        cache(v_pages=jnp.zeros((2, 4, 2, 8), jnp.bfloat16)),
    ),
    (
        ValueError,
        "`cache.v_pages` has num_pages=3 (shape (3, 4, 2, 8)), expected 2",
        cache(v_pages=jnp.zeros((3, 4, 2, 8))),
    ),
    (
        ValueError,
        "`cache.k_pages` must have shape [num_pages, page_size, num_kv_heads, head_dim]",
        cache(k_pages=jnp.zeros((2, 4, 2))),
    ),
    (
        ValueError,
        "page_size of `cache` must be at least 1, got 0",
        cache(k_pages=jnp.zeros((2, 0, 2, 8)), v_pages=jnp.zeros((2, 0, 2, 8))),
    ),
    (TypeError, "`cache.k_scale` must be an array, got float", cache(k_scale=0.5)),
    (
        TypeError,
        "`cache.v_scale` must be float32, got bfloat16",
        cache(v_scale=jnp.ones(2, jnp.bfloat16)),
    ),
    (ValueError, "`cache.k_scale` has num_kv_heads=4", cache(k_scale=jnp.ones(4))),
    (
        ValueError,
        "`cache.k_scale` must have shape [], [num_kv_heads] or [num_pages, page_size, "
        "num_kv_heads], got (3, 2)",
        cache(k_scale=jnp.ones((3, 2))),
    ),
    (ValueError, "dynamic_scales must be False or True, got None", {"dynamic_scales": None}),
    (
        TypeError,
        "`cache.k_pages` must be int8, float8_e4m3fn, float8_e4m3fnuz or float8_e5m2, got float32",
        {"dynamic_scales": True},
    ),
    (
        ValueError,
        "dynamic_scales needs `cache.k_scale` per token, with shape (2, 4, 2), got None.",
        {"dynamic_scales": True, "cache": INT8},
    ),
    (
        ValueError,
        "dynamic_scales needs `cache.v_scale` per token, with shape (2, 4, 2), got shape (2,).",
        {
            "dynamic_scales": True,
            "cache": dataclasses.replace(INT8, k_scale=jnp.ones((2, 4, 2)), v_scale=jnp.ones(2)),
        },
    ),
    (ValueError, "`cache.k_pages` has a layer axis", {"cache": LAYERED}),
    (ValueError, "layer=3 is outside the cache's 3 layers", {"cache": LAYERED, "layer": 3}),
    (ValueError, "`layer` is given, but `cache.k_pages` has no layer axis", {"layer": 0}),
    (ValueError, "`layer` must be a scalar", {"cache": LAYERED, "layer": INTS}),
    (
        TypeError,
        "`slot_mapping` must be int32 or int64, got float32",
        {"slot_mapping": jnp.ones(3)},
    ),
    (
        ValueError,
        "`slot_mapping` has tokens=2 (shape (2,)), expected 3",
        {"slot_mapping": INTS[:2]},
    ),
    (ValueError, "`positions` is given, but there is no rope", {"rope": None}),
    (
        ValueError,
        "`offsets` is given, but there is no rope",
        {"rope": None, "positions": None, "offsets": INTS},
    ),
    (ValueError, "`positions` must be given with a rope", {"positions": None}),
    (TypeError, "`positions` must be int32, got float32", {"positions": jnp.ones(3)}),
    (ValueError, "`positions` has tokens=2", {"positions": INTS[:2]}),
    (ValueError, "`positions` must have shape [tokens]", {"positions": INTS[None]}),
    (ValueError, "`positions` must have shape [3, tokens]", {**mrope(2, 1, 1), "positions": INTS}),
    (TypeError, "`offsets` must be int32", {"offsets": jnp.ones(3)}),
    (ValueError, "`offsets` has tokens=1", {"offsets": INTS[:1]}),
    (TypeError, "`rope` must be a Rope, got tuple", {"rope": (1, 2)}),
    (ValueError, "rope.table_width must be 'half' or 'full', got 4", rope(table_width=4)),
    (ValueError, "rope.interleaved must be False or True, got 'gptj'", rope(interleaved="gptj")),
    (ValueError, "rope.nope_first must be False or True", rope(nope_first=2)),
    (TypeError, "rope.rotary_dim must be int", rope(rotary_dim=4.0)),
    (ValueError, "rope.rotary_dim must be at least 2, got 0", rope(rotary_dim=0)),
    (ValueError, "rope.rotary_dim must be even and at most head_dim=8, got 5", rope(rotary_dim=5)),
    (
        ValueError,
        "rope.rotary_dim must be even and at most head_dim=8, got 16",
        rope(rotary_dim=16),
    ),
    (
        ValueError,
        "`rope.cos` has table_width=4 (shape (5, 4)), expected 8 from rotary_dim=8 "
        "(rope.table_width='full')",
        rope(table_width="full"),
    ),
    (
        ValueError,
        "`rope.cos` has table_width=4 (shape (5, 4)), expected 2 from half of rotary_dim=4",
        rope(rotary_dim=4),
    ),
    (ValueError, "`rope.sin` has max_positions=4", rope(sin=jnp.ones((4, 4)))),
    (TypeError, "`rope.cos` must be float32, bfloat16 or float16", rope(cos=jnp.ones((5, 4), int))),
    (
        ValueError,
        "max_positions of `rope` must be at least 1",
        rope(cos=jnp.ones((0, 4)), sin=jnp.ones((0, 4))),
    ),
    (ValueError, "rope.mrope_interleaved needs rope.mrope_sections", rope(mrope_interleaved=True)),
    (ValueError, "rope.mrope_sections must be a tuple of 3 ints, got (2, 2)", mrope(2, 2)),
    (TypeError, "each of rope.mrope_sections must be int", mrope(2, 1.0, 1)),
    (ValueError, "each of rope.mrope_sections must be at least 0", mrope(5, -1, 0)),
    (
        ValueError,
        "rope.mrope_sections=(2, 2, 2) sum to 6, expected 4, the pairs of rotary_dim=8",
        mrope(2, 2, 2),
    ),
    (
        ValueError,
        "rope.mrope_sections=(1, 1, 2) cannot alternate over 4 pairs",
        mrope(1, 1, 2, interleaved=True),
    ),
    (TypeError, "`qk_norm` must be a QKNorm, got float", {"qk_norm": 1e-6}),
    (ValueError, "qk_norm.scope must be 'head' or 'all_heads'", norm(scope="token")),
    (ValueError, "qk_norm.weight_offset must be 0.0 or 1.0, got 2.0", norm(weight_offset=2.0)),
    (ValueError, "qk_norm.normalize_v must be False or True", norm(normalize_v="yes")),
    (TypeError, "qk_norm.epsilon must be float, got NoneType", norm(epsilon=None)),
    (ValueError, "qk_norm.epsilon must be positive, got 0.0", norm(epsilon=0.0)),
    (ValueError, "qk_norm.epsilon must be finite", norm(epsilon=float("nan"))),
    (
        ValueError,
        "qk_norm.weight_offset=1.0 needs a weight",
        norm(q_weight=None, k_weight=None, weight_offset=1.0),
    ),
    (ValueError, "`qk_norm.q_weight` has head_dim=4", norm(q_weight=jnp.ones(4))),
    (TypeError, "`qk_norm.k_weight` must be float32", norm(k_weight=jnp.ones(8, jnp.int32))),
    (
        ValueError,
        "`qk_norm.q_weight` has num_q_heads*head_dim=8 (shape (8,)), expected 32",
        norm(scope="all_heads"),
    ),
]


@pytest.mark.parametrize("error, message, changes", ERRORS, ids=[e[1][:40] for e in ERRORS])
def test_errors_name_the_argument(error, message, changes):
    with pytest.raises(error, match=f"^fused_qkv_rope_cache: .*{re.escape(message)}"):
        _call(**changes)
