# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The dimensions of split-KV attention and of its gradients, and which of them may be sharded."""

from collections.abc import Mapping, Sequence

from jax_attn._src import sharding
from jax_attn._src.split_kv_attention.problem import GradientOptions, Options

Shape = tuple[int, ...]

_ROWS = "batch (kv_head group) query_len kv_len"
_DENSE = {
    "query": "batch query_len (kv_head group) head_dim",
    "key": "batch kv_len kv_head head_dim",
    "value": "batch kv_len kv_head v_head_dim",
    "bias": _ROWS,
    "mask": _ROWS,
    "kv_lengths": "batch",
    "query_offset": "batch",
    "page_table": "batch page_index",
    "layer": "",
    "alibi_slopes": "(kv_head group)",
    "sinks": "(kv_head group)",
    "out": "batch query_len (kv_head group) v_head_dim",
    "lse": "batch query_len (kv_head group)",
}
_PAGES = {
    "NHD": "layer_index page slot kv_head",
    "HND": "layer_index page kv_head slot",
}


def spec(shapes: Mapping[str, Shape], options: Options) -> sharding.ShardingSpec:
    """Declares the dimensions of a call, and of its cotangents, `d_query` for `query`."""
    arrays = dict(_DENSE)
    merged: tuple[str, ...] = ("kv_len",)
    if options.page_layout is not None:
        pages = _PAGES[options.page_layout].removeprefix(
            "" if options.has_layers else "layer_index "
        )
        arrays |= {"key": f"{pages} head_dim", "value": f"{pages} v_head_dim"}
        rows = _ROWS.replace("kv_len", "(page_index slot)")
        arrays |= {"bias": rows, "mask": rows}
        merged = ("page", "page_index")
    for name in ("k_scale", "v_scale"):
        stored = arrays["key"].split()[:-1]
        per_head = ["layer_index", "kv_head"][2 - options.rank(name) :]
        is_per_token = options.rank(name) == len(stored)
        arrays[name] = " ".join(stored if is_per_token else per_head)
    # With one kv head any split of the query heads is a problem with one kv head.
    shardable = ("batch", "kv_head") if _kv_heads(shapes, options) > 1 else ("batch", "group")
    arrays |= {f"d_{name}": dims for name, dims in arrays.items()}
    return sharding.ShardingSpec(arrays, shardable, merged)


def call(shapes: Mapping[str, Shape], results: Sequence[Shape], options: Options) -> sharding.Call:
    """The declaration of attention itself."""
    return _call(shapes, ("out", "lse"), results, options)


def gradient_call(
    shapes: Mapping[str, Shape], results: Sequence[Shape], options: GradientOptions
) -> sharding.Call:
    """The declaration of the gradients."""
    names = [f"d_{name}" for name in options.wanted]
    return _call(shapes, names, results, options.attention)


def _call(
    shapes: Mapping[str, Shape], names: Sequence[str], results: Sequence[Shape], options: Options
) -> sharding.Call:
    kv_heads = _kv_heads(shapes, options)
    sizes = {"kv_head": kv_heads, "group": shapes["query"][-2] // kv_heads}
    if options.page_layout is not None:
        sizes |= {"page_index": shapes["page_table"][-1], "slot": _page_size(shapes, options)}
    return sharding.Call(
        spec=spec(shapes, options),
        operands=shapes,
        results=dict(zip(names, results, strict=True)),
        # Each result has all dimensions of vmap, and the first is like the query.
        num_batch_dims=len(results[0]) - 4,
        sizes=sizes,
    )


def _kv_heads(shapes: Mapping[str, Shape], options: Options) -> int:
    return shapes["key"][-3 if options.page_layout == "HND" else -2]


def _page_size(shapes: Mapping[str, Shape], options: Options) -> int:
    return shapes["key"][-2 if options.page_layout == "HND" else -3]
