# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of user arguments, and the wording of their errors."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Dims:
    """Binds the dimension names of one call to sizes, and reports arguments that disagree.

    A shape is described by a string of names, one per dimension: `"batch kv_len num_kv_heads"`.
    A number must match exactly, and `#name` is either the size of `name` or 1.
    """

    def __init__(self, op: str, **sizes: int):
        self.op = op
        self._sizes: dict[str, int] = dict(sizes)
        self._origin: dict[str, str] = {}

    def __getitem__(self, name: str) -> int:
        return self._sizes[name]

    def set(self, name: str, size: int, origin: str) -> None:
        """Sets the size of a dimension that no argument has by itself."""
        self._sizes[name] = size
        self._origin[name] = origin

    def bind(self, argument: str, array: Any, spec: str) -> None:
        """Checks `array` against `spec`; the first argument to use a name decides its size."""
        shape = np.shape(array)
        names = spec.split()
        if len(shape) != len(names):
            raise ValueError(
                f"{self.op}: `{argument}` must have shape [{', '.join(names)}], got shape {shape}."
            )
        for name, size in zip(names, shape, strict=True):
            may_broadcast = name.startswith("#")
            name = name.removeprefix("#")
            expected = int(name) if name.isdigit() else self._sizes.get(name)
            if expected is None:
                self._sizes[name] = size
                self._origin[name] = f"`{argument}` (shape {shape})"
            elif size != expected and not (may_broadcast and size == 1):
                where = f" from {self._origin[name]}" if name in self._origin else ""
                raise ValueError(
                    f"{self.op}: `{argument}` has {name}={size} (shape {shape}), expected "
                    f"{expected}{' or 1' if may_broadcast else ''}{where}."
                )


def check_array(op: str, argument: str, value: Any) -> None:
    """Raises `TypeError` unless `value` is an array."""
    if not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(f"{op}: `{argument}` must be an array, got {type(value).__name__}.")


def check_dtype(op: str, argument: str, array: Any, accepted: Collection[Any]) -> None:
    """Raises `TypeError` unless the dtype of `array` is one of `accepted`."""
    check_array(op, argument, array)
    names = [jnp.dtype(d).name for d in accepted]
    if jnp.dtype(array.dtype).name not in names:
        raise TypeError(f"{op}: `{argument}` must be {_one_of(names)}, got {array.dtype}.")


def check_choice(op: str, argument: str, value: Any, accepted: Collection[Any]) -> None:
    """Raises `ValueError` unless `value` is one of `accepted`."""
    if value not in accepted:
        raise ValueError(
            f"{op}: {argument} must be {_one_of([repr(a) for a in accepted])}, got {value!r}."
        )


def check_positive(op: str, argument: str, value: Any, kind: type, off: str) -> None:
    """Raises unless `value` is None or a positive, finite number of `kind`.

    Args:
      op: Name of the operation.
      argument: Name of the argument.
      value: What the user gave.
      kind: `int` or `float`; an int is accepted as a float.
      off: What None stands for, told to users who tried 0 or -1.
    """
    if value is None:
        return
    kinds = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{op}: {argument} must be {kind.__name__}, got {type(value).__name__}.")
    if not (value > 0 and np.isfinite(value)):
        raise ValueError(f"{op}: {argument} must be positive, got {value}. Use None for {off}.")


def check_finite(op: str, argument: str, value: Any) -> None:
    """Raises unless `value` is a finite Python or NumPy number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{op}: {argument} must be float, got {type(value).__name__}.")
    if not np.isfinite(value):
        raise ValueError(f"{op}: {argument} must be finite, got {value}.")


def check_layer(op: str, k_pages: Any, layer: Any) -> jax.Array | None:
    """Returns `layer` as an int32 scalar; raises unless the cache has a layer axis with it."""
    has_layers = np.ndim(k_pages) == 5
    if has_layers and layer is None:
        raise ValueError(
            f"{op}: `cache.k_pages` has a layer axis (shape {np.shape(k_pages)}); give `layer`."
        )
    if not has_layers and layer is not None:
        raise ValueError(
            f"{op}: `layer` is given, but `cache.k_pages` has no layer axis "
            f"(shape {np.shape(k_pages)})."
        )
    if layer is None:
        return None
    if isinstance(layer, int | np.integer) and not isinstance(layer, bool):
        if not 0 <= layer < k_pages.shape[0]:
            raise ValueError(
                f"{op}: layer={layer} is outside the cache's {k_pages.shape[0]} layers."
            )
        return jnp.asarray(layer, jnp.int32)
    check_dtype(op, "layer", layer, (jnp.int32,))
    if np.ndim(layer):
        raise ValueError(f"{op}: `layer` must be a scalar, got shape {np.shape(layer)}.")
    return jnp.asarray(layer)


def check_at_least(op: str, argument: str, value: Any, least: int) -> None:
    """Raises unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{op}: {argument} must be int, got {type(value).__name__}.")
    if value < least:
        raise ValueError(f"{op}: {argument} must be at least {least}, got {value}.")


def check_together(op: str, given: Mapping[str, Any]) -> None:
    """Raises `ValueError` if more than one of mutually exclusive options is given."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{op}: {' and '.join(names)} exclude each other; give one of them.")


def mesh_axes(op: str, argument: str, value: Any) -> tuple[str, ...]:
    """Returns the names of mesh axes as a tuple; raises unless they are manual here."""
    axes = (value,) if isinstance(value, str) else value
    if not isinstance(axes, tuple) or not all(isinstance(axis, str) for axis in axes):
        raise TypeError(f"{op}: {argument} must be str or a tuple of str, got {value!r}.")
    if not axes or len(set(axes)) != len(axes):
        raise ValueError(f"{op}: {argument} must name different mesh axes, got {value!r}.")
    for axis in axes:
        try:
            jax.lax.axis_size(axis)
        except NameError:
            raise ValueError(
                f"{op}: {argument} names {axis!r}, which is no manual mesh axis here. It is for "
                "use inside jax.shard_map; elsewhere shard the arrays, and leave it out."
            ) from None
    return axes


def _one_of(names: Collection[str]) -> str:
    *head, last = names
    return f"{', '.join(head)} or {last}" if head else last


def check_scale(dims: Dims, argument: str, scale: Any, specs: Collection[str]) -> None:
    """Raises unless `scale` is None, or a float32 scalar or array described by one of `specs`.

    Args:
      dims: Dimensions of the call.
      argument: Name of the argument.
      scale: What the user gave.
      specs: Shapes as for `Dims.bind`, each of another rank.
    """
    if scale is None:
        return
    check_dtype(dims.op, argument, scale, (jnp.float32,))
    by_rank = {0: "", **{len(spec.split()): spec for spec in specs}}
    if scale.ndim not in by_rank:
        shapes = _one_of([f"[{', '.join(spec.split())}]" for spec in by_rank.values()])
        raise ValueError(f"{dims.op}: `{argument}` must have shape {shapes}, got {scale.shape}.")
    dims.bind(argument, scale, by_rank[scale.ndim])
