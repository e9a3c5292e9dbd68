# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The XLA FFI handlers of this installation, for those who call or register them themselves.

The operations of `jax_attn` register what they need at their first use. Programs that contain a
custom call without having traced it, such as exported ones, call `register` first.

The arguments, attributes and results of each target are documented in `csrc/ffi/<op>.h`, and
`examples/ffi_call.py` calls one. For C++ hosts, the modules in `jax_attn/_native` define the
handlers as the symbols `JaxAttn<Op><Platform>`; the capsules hold their addresses.
"""

from typing import Any

import jax

from jax_attn._src import checks, registration


def register() -> tuple[str, ...]:
    """Registers the handlers of all platforms with JAX; harmless if done before.

    Returns:
      The platforms that there are handlers for, such as "cpu".
    """
    return registration.platforms()


def handlers(platform: str) -> dict[str, Any]:
    """Returns the handlers of a platform as capsules for `jax.ffi.register_ffi_target`.

    Args:
      platform: As JAX names it in lowering: "cpu".

    Returns:
      Capsules by target name. They are already registered under these names.

    Raises:
      ValueError: If there are no handlers for the platform.
    """
    return _module(platform).handlers()


def capabilities() -> list[dict[str, Any]]:
    """Returns what the compiled kernels of this installation can do, a row per op and platform.

    This is the table that the operations dispatch by.
    """
    return [row for name in registration.platforms() for row in _module(name).capabilities()]


def variants(platform: str) -> list[str]:
    """Returns the kernel variants of a platform that this machine can run, the best first.

    On CPU they are instruction sets, such as "avx2".

    Args:
      platform: As JAX names it in lowering: "cpu".

    Raises:
      ValueError: If there are no handlers for the platform.
    """
    return list(_module(platform).variants())


def split_kv_workspace_size(
    platform: str,
    *,
    batch: int,
    query_len: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    kv_len: int,
    page_layout: str | None = None,
    num_splits: int = 0,
    split_size: int = 0,
) -> int:
    """Returns the size of the workspace result of target `jax_attn_split_kv_attention`.

    Args:
      platform: As JAX names it in lowering: "cpu".
      batch: Product of the batch dimensions.
      query_len: Queries in a sequence.
      num_q_heads: Query heads.
      num_kv_heads: Heads of keys and values.
      head_dim: Size of queries and keys.
      v_head_dim: Size of values.
      kv_len: Keys that fit in a context: the buffer's length, or pages times their size.
      page_layout: "NHD", "HND", or None for dense keys and values.
      num_splits: As the attribute.
      split_size: As the attribute.

    Returns:
      Number of float32 elements.

    Raises:
      ValueError: If there are no handlers for the platform, or an argument is out of range.
      TypeError: If a size is not an int.
    """
    op = "split_kv_workspace_size"
    sizes = {
        "batch": batch,
        "query_len": query_len,
        "num_q_heads": num_q_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "v_head_dim": v_head_dim,
        "kv_len": kv_len,
        "num_splits": num_splits,
        "split_size": split_size,
    }
    for name, size in sizes.items():
        checks.check_at_least(op, name, size, 1 if name == "num_kv_heads" else 0)
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"{op}: num_q_heads={num_q_heads} is not a multiple of num_kv_heads={num_kv_heads}."
        )
    checks.check_choice(op, "page_layout", page_layout, ("NHD", "HND", None))
    plan = _module(platform).split_kv_plan(heads_first=page_layout == "HND", **sizes)
    return plan["workspace_size"]


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """Returns the checks to disable when exporting: `jax.export.export(f, disabled_checks=...)`.

    Export refuses custom calls that it does not know. Those of `jax_attn` keep their meaning:
    attributes and operands of a target only ever grow by optional ones.
    """
    targets = {target for name in registration.platforms() for target in handlers(name)}
    return [jax.export.DisabledSafetyCheck.custom_call(target) for target in sorted(targets)]


def _module(platform: str) -> Any:
    module = registration.native_module(platform)
    if module is None:
        raise ValueError(
            f"jax_attn.ffi: there are no handlers for {platform!r}; this installation has them "
            f"for {registration.platforms()}."
        )
    return module
