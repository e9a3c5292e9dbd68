# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""How operations are split over a mesh: one declaration per operation, everything else derived."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

# Mesh axes along one dimension.
Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ShardingSpec:
    """Names the dimensions of an operation's arrays, and those that may be sharded.

    Dimensions that vmap adds in front may always be sharded. Everything that is not shardable is
    replicated before the operation runs.

    Attributes:
      arrays: Dimension names of operands and results: `"batch (kv_head group) head_dim"`. A
        dimension `(a b)` is the product of both, `a` varying slowest.
      shardable: Names along which the operation on shards is a shard of the operation.
    """

    arrays: Mapping[str, str]
    shardable: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Call:
    """One use of an operation.

    Attributes:
      spec: The declaration of the operation.
      operands: Shapes of the operands, by name and in order.
      results: Shapes of the results, by name and in order.
      num_batch_dims: Dimensions that vmap added in front of the results.
      sizes: Sizes of the names that make up products.
    """

    spec: ShardingSpec
    operands: Mapping[str, tuple[int, ...]]
    results: Mapping[str, tuple[int, ...]]
    num_batch_dims: int
    sizes: Mapping[str, int]

    def plan(
        self, specs: Mapping[str, PartitionSpec], axis_sizes: Mapping[str, int]
    ) -> dict[str, Axes]:
        """Chooses mesh axes for dimension names from how the operands are sharded.

        The first operand that shards a name decides. An axis is used once, and only where it
        divides the size: query heads on more devices than there are kv heads would leave devices
        with a wrong group of query heads, so they are gathered from such an axis instead.
        """
        plan: dict[str, Axes] = {}
        used: set[str] = set()
        for array, spec in specs.items():
            for factors, entry in zip(self._factors(array), spec, strict=False):
                axes = tuple(axis for axis in _axes(entry) if axis not in used)
                if not factors or not axes or factors[0] in plan:
                    continue
                num_shards = math.prod(axis_sizes[axis] for axis in axes)
                if self._is_shardable(factors[0]) and self._size(factors[0]) % num_shards == 0:
                    plan[factors[0]] = axes
                    used.update(axes)
        return plan

    def partition_spec(self, array: str, plan: Mapping[str, Axes]) -> PartitionSpec:
        """Returns the sharding of an operand or result under a plan."""
        entries = [plan.get(factors[0]) if factors else None for factors in self._factors(array)]
        return PartitionSpec(*[a[0] if a is not None and len(a) == 1 else a for a in entries])

    def shardy_rule(self) -> tuple[str, dict[str, Any]]:
        """Returns the Shardy rule of the call: its text, and its special factors and sizes."""
        replicated: dict[str, None] = {}  # ordered: Shardy wants factors as they first appear
        in_products: set[str] = set()
        whole: set[str] = set()

        def terms(arrays: Mapping[str, tuple[int, ...]]) -> str:
            return ", ".join(" ".join(dims(array)) for array in arrays)

        def dims(array: str) -> list[str]:
            texts = []
            for i, factors in enumerate(self._factors(array)):
                factors = factors or [f"one_{array}_{i}"]
                for factor in factors:
                    if not self._is_shardable(factor):
                        replicated[factor] = None
                if len(factors) > 1:
                    in_products.update(factors)
                    texts.append(f"({' '.join(factors)})")
                else:
                    whole.add(factors[0])
                    texts.append(factors[0])
            return texts

        rule = f"{terms(self.operands)} -> {terms(self.results)}"
        special = {"need_replication_factors": tuple(replicated)} if replicated else {}
        # The size of a factor that is a dimension by itself is known from there.
        return rule, special | {factor: self._size(factor) for factor in in_products - whole}

    def _factors(self, array: str) -> list[list[str]]:
        """Names of each dimension of an array; none for a dimension of size 1."""
        shape = self.operands[array] if array in self.operands else self.results[array]
        named = _parse(self.spec.arrays[array])
        named = named[len(named) - min(len(named), len(shape)) :]
        num_extra = len(shape) - len(named)
        extra = [[f"vmap_{self.num_batch_dims - num_extra + i}"] for i in range(num_extra)]
        return [
            [] if size == 1 else [f for f in factors if self.sizes.get(f) != 1]
            for factors, size in zip(extra + named, shape, strict=True)
        ]

    def _is_shardable(self, factor: str) -> bool:
        return factor.startswith("vmap_") or factor in self.spec.shardable

    def _size(self, factor: str) -> int:
        if factor in self.sizes:
            return self.sizes[factor]
        shapes = {**self.operands, **self.results}
        return next(
            size
            for array, shape in shapes.items()
            for factors, size in zip(self._factors(array), shape, strict=True)
            if factors == [factor]
        )


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a device is in a mesh over which dimension names are sharded.

    Attributes:
      plan: Mesh axes of each name that is sharded.
      axis_sizes: Sizes of the mesh axes.
    """

    plan: Mapping[str, Axes]
    axis_sizes: Mapping[str, int]

    def count(self, name: str) -> int:
        """Shards of a name."""
        return math.prod(self.axis_sizes[axis] for axis in self.plan.get(name, ()))

    def index(self, name: str) -> jax.Array:
        """Which of the shards of a name, which must be sharded, this device has."""
        return lax.axis_index(self.plan[name])


def _parse(text: str) -> list[list[str]]:
    dims: list[list[str]] = []
    inside = False
    for word in text.split():
        if inside:
            dims[-1].append(word.strip("()"))
        else:
            dims.append([word.strip("()")])
        inside = (inside or word.startswith("(")) and not word.endswith(")")
    return dims


def _axes(entry: Any) -> Axes:
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return tuple(entry) if isinstance(entry, Sequence) and not isinstance(entry, str) else (entry,)
