# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""How operations are split over a mesh: one declaration per operation, everything else derived."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

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
      merged: Names along which the operation on shards gives parts of all its results, which the
        operation knows how to merge.
    """

    arrays: Mapping[str, str]
    shardable: tuple[str, ...]
    merged: tuple[str, ...] = ()


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

        The largest operand that shards a name decides, since moving it would cost most: the first
        of those of one size. An axis is used once, and only where it divides the size: query heads
        on more devices than there are kv heads would leave devices with a wrong group of query
        heads, so they are gathered from such an axis instead.
        """
        plan: dict[str, Axes] = {}
        used: set[str] = set()
        for array in sorted(specs, key=lambda array: -math.prod(self.operands[array])):
            spec = specs[array]
            for factors, entry in zip(self._factors(array), spec, strict=False):
                axes = tuple(axis for axis in _axes(entry) if axis not in used)
                if not factors or not axes or factors[0] in plan:
                    continue
                num_shards = math.prod(axis_sizes[axis] for axis in axes)
                if self._may_plan(factors[0]) and self._size(factors[0]) % num_shards == 0:
                    plan[factors[0]] = axes
                    used.update(axes)
        return plan

    def partition_spec(self, array: str, plan: Mapping[str, Axes]) -> PartitionSpec:
        """Returns the sharding of an operand or result under a plan."""
        entries = [plan.get(factors[0]) if factors else None for factors in self._factors(array)]
        return PartitionSpec(*[a[0] if a is not None and len(a) == 1 else a for a in entries])

    def merged_axes(self, plan: Mapping[str, Axes]) -> dict[str, Axes]:
        """Returns the part of a plan after which results are to be merged."""
        return {name: axes for name, axes in plan.items() if name in self.spec.merged}

    def summed_axes(self, result: str, plan: Mapping[str, Axes]) -> Axes:
        """Returns the axes on which a result that is a sum has terms: those of names it lacks."""
        own = {factors[0] for factors in self._factors(result) if factors}
        return tuple(axis for name, axes in plan.items() if name not in own for axis in axes)

    def shardy_rule(self) -> tuple[str, dict[str, Any]]:
        """Returns the Shardy rule of the call: its text, and its special factors and sizes."""
        # Ordered: Shardy wants factors as they first appear.
        replicated: dict[str, None] = {}
        reduced: dict[str, None] = {}
        in_products: set[str] = set()
        whole: set[str] = set()

        def terms(arrays: Mapping[str, tuple[int, ...]]) -> str:
            return ", ".join(" ".join(dims(array)) for array in arrays)

        def dims(array: str) -> list[str]:
            texts = []
            for i, factors in enumerate(self._factors(array)):
                factors = factors or [f"one_{array}_{i}"]
                for factor in factors:
                    if factor in self.spec.merged:
                        reduced[factor] = None
                    elif not self._may_plan(factor):
                        replicated[factor] = None
                if len(factors) > 1:
                    in_products.update(factors)
                    texts.append(f"({' '.join(factors)})")
                else:
                    whole.add(factors[0])
                    texts.append(factors[0])
            return texts

        rule = f"{terms(self.operands)} -> {terms(self.results)}"
        kept = {factor for array in self.results for dim in self._factors(array) for factor in dim}
        special = {
            "reduction_factors": tuple(factor for factor in reduced if factor not in kept),
            "need_replication_factors": tuple(replicated),
        }
        special = {kind: factors for kind, factors in special.items() if factors}
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

    def _may_plan(self, factor: str) -> bool:
        names = (*self.spec.shardable, *self.spec.merged)
        return factor.startswith("vmap_") or factor in names

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


def num_shards(plan: Mapping[str, Axes], name: str) -> int:
    """Returns the shards of a name, where the mesh axes of a plan are manual."""
    return math.prod(lax.axis_size(axis) for axis in plan.get(name, ()))


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
