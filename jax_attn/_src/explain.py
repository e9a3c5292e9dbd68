# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Explains what each attention call of a function will do."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jax_attn._src.fused_qkv_rope_cache import primitive as fused_qkv
from jax_attn._src.small_seq_attention import primitive as small_seq
from jax_attn._src.split_kv_attention import primitive as split_kv

_OPERATIONS = (
    split_kv.operation,
    fused_qkv.operation,
    small_seq.operation,
    small_seq.gradient_operation,
)
_DESCRIBE = {
    split_kv.NAME: split_kv.describe,
    fused_qkv.NAME: fused_qkv.describe,
    small_seq.NAME: small_seq.describe,
    small_seq.GRADIENT_NAME: small_seq.describe,
}


@dataclasses.dataclass(frozen=True)
class CallExplanation:
    """What one call of an operation does.

    Attributes:
      op: Public name of the operation.
      platform: Where it runs, as JAX names platforms in lowering.
      implementation: "native" or "xla".
      variant: Variant of the native kernel, such as an instruction set; None for "xla".
      num_splits: Parts that a context of full length is cut into; None for "xla", and where the
        operation has no context.
      scratch_bytes: Workspace of the native kernel; None for "xla".
      bytes_moved: What has to be read and written at least, for contexts of full length.
      cache_copies: Copies of arrays like the keys or the values in the compiled program, such as
        XLA makes where a cache is updated without being donated. None if it was not compiled,
        because `platform` is not the default backend.
      refused: Why each other implementation is not used, by its name.
    """

    op: str
    platform: str
    implementation: str
    variant: str | None
    num_splits: int | None
    scratch_bytes: int | None
    bytes_moved: int
    cache_copies: int | None
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.platform}: {self.implementation}"]
        if self.implementation == "native":
            splits = "" if self.num_splits is None else f", {self.num_splits} splits"
            lines[0] += f" ({self.variant}{splits})"
            lines.append(f"  scratch: {self.scratch_bytes} bytes")
        at_full_length = "" if self.op == fused_qkv.NAME else " at full length"
        lines.append(f"  moves: {self.bytes_moved} bytes{at_full_length}")
        if self.cache_copies:
            lines.append(f"  copies of the cache: {self.cache_copies}; is it donated?")
        lines += [f"  not {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def explain(
    fn: Callable[..., Any], *, platform: str | None = None
) -> Callable[..., list[CallExplanation]]:
    """Returns a function that explains the attention calls that `fn` makes.

    `explain(fn)(*args)` traces `fn` and reports every call of an operation of this package, in the
    order of the program, also inside jit, scan, while and shard_map (there per shard). The backward
    pass of `small_seq_attention` is a call of its own; those of other operations are plain JAX and
    are not listed.

    Args:
      fn: A function, or a jitted one; donation is seen only in the latter.
      platform: Platform to explain for, such as "cpu" or "cuda"; the default backend if None.

    Returns:
      A function of the arguments of `fn` that returns a list of `CallExplanation`. It raises what
      the program would on `platform`: NotImplementedError for `implementation="native"` without a
      kernel.
    """

    @functools.wraps(fn)
    def explained(*args: Any, **kwargs: Any) -> list[CallExplanation]:
        target = platform or _lowering_platform(jax.default_backend())
        # Traced by jit itself, so that its static arguments stay static.
        jitted: Any = fn if hasattr(fn, "trace") else jax.jit(fn)
        traced = jitted.trace(*args, **kwargs)
        calls = list(_calls(traced.jaxpr.jaxpr))
        program = None
        if calls and target == _lowering_platform(jax.default_backend()):
            program = traced.lower().compile().as_text()
        return [_explain_call(operation, eqn, target, program) for operation, eqn in calls]

    return explained


def _lowering_platform(backend: str) -> str:
    return {"gpu": "cuda"}.get(backend, backend)


def _calls(jaxpr: Any) -> Iterator[tuple[Any, Any]]:
    for eqn in jaxpr.eqns:
        for operation in _OPERATIONS:
            if operation.matches(eqn.primitive):
                yield operation, eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _calls(inner)


def _explain_call(operation: Any, eqn: Any, platform: str, program: str | None) -> CallExplanation:
    names, options = eqn.params["names"], eqn.params["options"]
    avals = {name: var.aval for name, var in zip(names, eqn.invars, strict=True)}
    kernel = operation.kernel(platform, avals, options)
    results = [var.aval for var in eqn.outvars]
    described = _DESCRIBE[operation.name](platform, avals, results, options)
    common = {
        "op": described.op,
        "platform": platform,
        "bytes_moved": described.bytes_moved,
        "cache_copies": None if program is None else _copies(program, *described.caches),
    }
    if isinstance(kernel, str):
        operation.refuse_fallback(options, platform, kernel)
        return CallExplanation(
            implementation="xla",
            variant=None,
            num_splits=None,
            scratch_bytes=None,
            refused={"native": kernel},
            **common,
        )
    _, extra_results, _ = kernel
    scratch = sum(math.prod(shape) * dtype.itemsize for shape, dtype in extra_results)
    return CallExplanation(
        implementation="native",
        variant=described.variant,
        num_splits=described.num_splits,
        scratch_bytes=scratch,
        refused={"xla": "the native kernel takes this case"},
        **common,
    )


_HLO_DTYPES = {
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "int8": "s8",
    "float8_e4m3fn": "f8e4m3fn",
    "float8_e4m3fnuz": "f8e4m3fnuz",
    "float8_e5m2": "f8e5m2",
}


def _copies(program: str, *caches: Any) -> int:
    """Counts the copies of arrays like `caches` in a compiled program."""
    shapes = {f"{_HLO_DTYPES[x.dtype.name]}[{','.join(map(str, x.shape))}]" for x in caches}
    return sum(
        len(re.findall(rf"= {re.escape(shape)}(?:{{[^}}]*}})? copy\(", program)) for shape in shapes
    )
