# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Problems for `fused_qkv_rope_cache`: built from named options, run, and compared."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import qkv_oracle

from jax_attn._src.fused_qkv_rope_cache.api import fused_qkv_rope_cache
from jax_attn._src.kv_cache import PagedKVCache
from jax_attn._src.qk_norm import QKNorm
from jax_attn._src.rope import Rope

INT_MAX = np.iinfo(np.int32).max

# Compiling takes nearly all of the time, LLVM's optimisations half of it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
compiled = jit(
    fused_qkv_rope_cache,
    static_argnames=("num_q_heads", "gate", "dynamic_scales", "implementation"),
)

# The first value of each option is the plain one.
CHOICES = {
    "cache_dtype": [
        *("float32", "bfloat16", "float16"),
        *("int8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"),
    ],
    "dtype": ["float32", "bfloat16", "float16"],
    "gate": [None, "interleaved", "blocked"],
    "layout": ["NHD", "HND"],
    "scale": [None, "scalar", "head", "token", "dynamic"],
    "layers": [None, 3],
    "norm": [None, "weight", "one_plus", "all_heads", "weightless_and_v"],
    "pairing": ["halves", "neighbours", None],
    "table": ["half", "full", "bfloat16"],
    "rotary": ["all", "first", "last"],
    "positions": ["plain", "offsets", "mrope", "mrope_interleaved"],
    "head_dims": [(64, 64), (80, 48), (128, 128), (256, 64)],
    "heads": [(4, 2), (1, 1), (6, 3)],
    "page_size": [4, 1, 16],
}
PLAIN = {name: values[0] for name, values in CHOICES.items()}


def covering():
    """Returns cases in which every two values of two options meet, chosen greedily."""
    names = list(CHOICES)
    todo = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(CHOICES[names[a]]))
        for j in range(len(CHOICES[names[b]]))
    }
    cases = []
    while todo:
        chosen = dict(min(todo))
        for a in range(len(names)):
            if a not in chosen:
                chosen[a] = max(
                    range(len(CHOICES[names[a]])),
                    key=lambda i, a=a: sum(
                        tuple(sorted([(a, i), other])) in todo for other in chosen.items()
                    ),
                )
        todo -= set(itertools.combinations(sorted(chosen.items()), 2))
        case = {name: CHOICES[name][chosen[a]] for a, name in enumerate(names)}
        if case["cache_dtype"] not in qkv_oracle.QUANTIZED and case["scale"] == "dynamic":
            case["scale"] = "token"
        cases.append(case)
    return cases


def random(rng, shape, dtype="float32"):
    return np.asarray(rng.normal(size=shape).astype(np.float32)).astype(jnp.dtype(dtype))


class Problem:
    """The arguments of one call, as NumPy arrays and plain dicts.

    Slots include one token that is skipped at each end of the cache, and a duplicate.
    """

    implementation = None  # tests set it for all problems

    def __init__(self, tokens=8, seed=0, slot_mapping=None, **options):
        o = {**PLAIN, **options}
        rng = np.random.default_rng(seed)
        (n, k), (h, hv), dtype = o["heads"], o["head_dims"], o["dtype"]
        columns = n * h * (1 if o["gate"] is None else 2) + k * (h + hv)
        self.layout = o["layout"]
        lead = () if o["layers"] is None else (o["layers"],)
        self.layer = np.int32(1) if lead else None
        page_size = o["page_size"]
        num_pages = -(-2 * tokens // page_size) + 1
        pages = (num_pages, page_size, k) if self.layout == "NHD" else (num_pages, k, page_size)
        pages = (*lead, *pages)
        # Bytes of all values, so that what is not written must stay as it is.
        cache_dtype = jnp.dtype(o["cache_dtype"])
        self.k_pages, self.v_pages = (
            rng.integers(0, 256, (*pages, d * cache_dtype.itemsize), np.uint8).view(cache_dtype)
            for d in (h, hv)
        )
        shape = {"scalar": (), "head": (*lead, k), "token": pages, "dynamic": pages}
        self.dynamic_scales = o["scale"] == "dynamic"
        self.k_scale = self.v_scale = None
        if o["scale"] is not None:
            self.k_scale, self.v_scale = (
                rng.uniform(0.02, 0.1, shape[o["scale"]]).astype(np.float32) for _ in range(2)
            )
        capacity = num_pages * page_size
        if slot_mapping is None:
            slot_mapping = rng.permutation(capacity)[:tokens]
            if tokens > 4:
                slot_mapping[[1, 2, 3]] = -1, capacity, slot_mapping[4]
        self.slot_mapping = np.asarray(slot_mapping).astype(np.int32)
        self.x = {
            "qkv": random(rng, (tokens, columns), dtype),
            **{"num_q_heads": n, "num_kv_heads": k, "head_dim": h, "v_head_dim": hv},
            **{"gate": o["gate"], "positions": None, "offsets": None},
        }
        self.norm, self.rope = self._norm(rng, o), self._rope(rng, o, tokens)

    def _norm(self, rng, o):
        if o["norm"] is None:
            return None
        norm = {"epsilon": 1e-3, "weight_offset": 0.0, "scope": "head", "normalize_v": False}
        x, weights = self.x, o["norm"] != "weightless_and_v"
        wide = o["norm"] == "all_heads"
        for name, heads in {"q_weight": "num_q_heads", "k_weight": "num_kv_heads"}.items():
            size = x["head_dim"] * (x[heads] if wide else 1)
            norm[name] = random(rng, size, o["dtype"]) if weights else None
        norm["weight_offset"] = 1.0 if o["norm"] == "one_plus" else 0.0
        norm["scope"] = "all_heads" if wide else "head"
        norm["normalize_v"] = not weights
        return norm

    def _rope(self, rng, o, tokens):
        if o["pairing"] is None:
            return None
        h = self.x["head_dim"]
        dims = h if o["rotary"] == "all" else h // 4
        mrope = o["positions"].startswith("mrope")
        width = dims if o["table"] == "full" else dims // 2
        third = dims // 2 // 3
        table_dtype = "bfloat16" if o["table"] == "bfloat16" else "float32"
        self.x["positions"] = rng.integers(-3, 40, (3, tokens) if mrope else tokens, np.int32)
        if o["positions"] == "offsets":
            self.x["offsets"] = rng.integers(-9, 9, tokens, np.int32)
        return {
            # Not angles: a full-width table need not repeat itself.
            "cos": random(rng, (33, width), table_dtype),
            "sin": random(rng, (33, width), table_dtype),
            "interleaved": o["pairing"] == "neighbours",
            "rotary_dim": None if o["rotary"] == "all" else dims,
            "nope_first": o["rotary"] == "last",
            "table_width": "full" if o["table"] == "full" else "half",
            "mrope_sections": (dims // 2 - 2 * third, third, third) if mrope else None,
            "mrope_interleaved": o["positions"] == "mrope_interleaved",
        }

    def arguments(self):
        """Returns the positional arguments, and those keyword arguments that are arrays."""
        rope = None if self.rope is None else Rope(**jax.tree.map(_on_device, self.rope))
        norm = None if self.norm is None else QKNorm(**jax.tree.map(_on_device, self.norm))
        return (_on_device(self.x["qkv"]), self.cache(), self.slot_mapping), {
            "positions": _on_device(self.x["positions"]),
            "offsets": _on_device(self.x["offsets"]),
            "rope": rope,
            "qk_norm": norm,
            "layer": _on_device(self.layer),
        }

    def cache(self):
        pages_and_scales = (self.k_pages, self.v_pages, self.k_scale, self.v_scale)
        return PagedKVCache(*map(_on_device, pages_and_scales), layout=self.layout)

    def call(self, arrays, keywords, function=fused_qkv_rope_cache):
        """The call itself, with the static arguments filled in."""
        static = {
            "num_q_heads": self.x["num_q_heads"],
            "gate": self.x["gate"],
            "dynamic_scales": self.dynamic_scales,
            "implementation": self.implementation,
        }
        return function(*arrays, **{**static, **keywords})

    def run(self):
        return self.call(*self.arguments(), function=compiled)

    def run_eagerly(self):
        return self.call(*self.arguments())

    def check(self, got):
        """Compares a result with the oracle."""
        dtype = self.x["qkv"].dtype
        want = qkv_oracle.qkv_heads(self.x, self.rope, self.norm)
        for name, wanted in zip(("query", "gate", "key", "value"), want, strict=True):
            array = getattr(got, name)
            if wanted is None:
                assert array is None
                continue
            assert array.dtype == dtype and array.shape == wanted.shape, name
            assert_rounded_once(array, wanted, name)
        assert got.cache.layout == self.layout
        for name, scale in {"k": self.k_scale, "v": self.v_scale}.items():
            pages = getattr(self, f"{name}_pages")
            new = np.asarray(got.key if name == "k" else got.value)
            stored = getattr(got.cache, f"{name}_pages")
            got_scale = getattr(got.cache, f"{name}_scale")
            if self.dynamic_scales:
                wanted = qkv_oracle.row_scales(new, pages.dtype)[..., None]
                where = self.slot_mapping, self.layout
                scale = qkv_oracle.fill_pages(scale[..., None], wanted, *where, None, self.layer)
                scale = scale[..., 0]
                assert ulps(got_scale, scale).max(initial=0) <= 1
            else:
                np.testing.assert_array_equal(got_scale, scale)
            filled = qkv_oracle.fill_pages(
                pages, new, self.slot_mapping, self.layout, scale, self.layer
            )
            assert stored.dtype == pages.dtype
            # XLA may divide by multiplying with the reciprocal.
            assert ulps(stored, filled).max(initial=0) <= (scale is not None), name


def _on_device(a):
    return jnp.asarray(a) if isinstance(a, np.ndarray | np.generic) else a


def bits(a):
    a = np.asarray(a)
    return a.view(f"uint{8 * a.dtype.itemsize}")


def ulps(a, b):
    """Returns how many values of their dtype lie between the elements; NaN equals NaN."""

    def ordered(x):
        x = np.asarray(x)
        if x.dtype == np.int8:
            return x.astype(np.int64)
        raw = bits(x).astype(np.int64)
        sign = 1 << (8 * x.dtype.itemsize - 1)
        raw = np.where(raw >= sign, sign - raw, raw)
        return np.where(np.isnan(x.astype(np.float32)), 10**9, raw)

    return np.abs(ordered(a) - ordered(b))


def assert_rounded_once(got, want, name):
    """Float32 arithmetic and one rounding: within an ulp, or of the float32 error of the row."""
    got = np.asarray(got)
    with np.errstate(invalid="ignore"):  # infinities
        error = np.abs(got.astype(np.float64) - want)
    # A rotation may cancel; what is left has the error of its terms.
    float32_error = 4e-6 * np.maximum(np.abs(want).max(initial=0), 1)
    fine = (ulps(got, want.astype(got.dtype)) <= 1) | (error <= float32_error)
    assert fine.all(), f"{name}: error {error[~fine].max()}, {np.count_nonzero(~fine)} elements"
