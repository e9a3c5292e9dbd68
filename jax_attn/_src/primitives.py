# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Builds JAX primitives. The one file that uses JAX interfaces without a promise of stability."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax._src import dispatch
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_attn._src import sharding

# A shape and dtype.
Aval = Any

Arrays = Mapping[str, jax.Array]


def result_like(operand: Aval, shape: Sequence[int], dtype: Any) -> Aval:
    """Returns the type of a result that varies over the manual mesh axes that `operand` does."""
    unsharded = operand.sharding.update(spec=PartitionSpec(*[None] * len(shape)))
    return operand.update(
        shape=tuple(shape), dtype=np.dtype(dtype), weak_type=False, sharding=unsharded
    )


def varying_alike(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Makes all arrays vary over the manual mesh axes that any of them varies over.

    Done outside custom_vjp, so that cotangents of replicated operands are summed over the mesh.
    """
    axes = {name: _varying_axes(jax.typeof(array)) for name, array in arrays.items()}
    union = frozenset().union(*axes.values())
    return {
        name: lax.pcast(array, tuple(sorted(union - axes[name])), to="varying")
        if union - axes[name]
        else array
        for name, array in arrays.items()
    }


def _varying_axes(aval: Aval) -> frozenset[str]:
    manual = getattr(aval, "manual_axis_type", None)
    return manual.varying if manual is not None else getattr(aval, "vma", frozenset())


def _under_vmap(
    reference: Callable[..., Sequence[jax.Array]],
) -> Callable[..., Sequence[jax.Array]]:
    """Returns `reference` for operands with the dimensions of vmap in front, which broadcast."""

    def mapped_reference(operands: Arrays, options: Any) -> Sequence[jax.Array]:
        extra = {name: x.ndim - options.rank(name) for name, x in operands.items()}
        depth = max(extra.values())
        if depth == 0:
            return reference(operands, options)
        outermost = {name: extra[name] == depth for name in operands}
        # Any size but 1 is the size that all have; it may be 0.
        sizes = {operands[name].shape[0] for name in operands if outermost[name]}
        size = next((s for s in sizes if s != 1), 1)
        axes, mapped = {}, {}
        for name, x in operands.items():
            shared = not outermost[name] or x.shape[0] != size
            axes[name] = None if shared else 0
            mapped[name] = x[0] if shared and outermost[name] else x
        return jax.vmap(lambda x: tuple(mapped_reference(x, options)), in_axes=(axes,))(mapped)

    return mapped_reference


def batch_shape(avals: Mapping[str, Aval], options: Any) -> tuple[int, ...]:
    """Returns what the dimensions of vmap in front of the operands broadcast to."""
    return np.broadcast_shapes(*[a.shape[: a.ndim - options.rank(n)] for n, a in avals.items()])


def shard_like(primal: jax.Array, gradient: jax.Array) -> jax.Array:
    """Gives a gradient the sharding that its type must have in explicit mode."""
    if not explicit_axes()[1]:
        return gradient
    return jax.sharding.reshard(gradient, jax.typeof(primal).sharding.spec)


def explicit_axes() -> tuple[Any, frozenset[str]]:
    """Returns the current mesh, and those of its axes over which arrays' types are sharded."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return mesh, frozenset()
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return mesh, frozenset(name for name, kind in axes if kind == AxisType.Explicit)


class Operation:
    """An operation as a pair of primitives: for a whole mesh, and for one device.

    The outer primitive has the batching rule and, where XLA partitions the program, the sharding
    rule. It lowers to the inner one on shards, which lowers to the compiled kernel where there is
    one and to the reference elsewhere.

    Shards may need more than the operation itself, such as a merge of what they found, or a part
    of an operand that all have; that is `on_shards`.

    Both take operands in order and the static parameters `names`, the operands' names, and
    `options`, whose `rank(name)` is the dimensions of an operand without those of vmap.
    """

    def __init__(
        self,
        name: str,
        *,
        operands: Sequence[str],
        results: Callable[..., Sequence[Aval]],
        reference: Callable[..., Sequence[jax.Array]],
        call: Callable[..., sharding.Call],
        kernels: Mapping[str, Callable[..., Any]],
        refuse_fallback: Callable[[Any, str, str], None],
        aliases: Callable[[Any], Mapping[str, int]] = lambda options: {},
        only_for_aliases: Collection[str] = (),
        on_shards: Callable[..., Sequence[jax.Array]] = lambda bind, x, *_: bind(x),
    ):
        """Registers the primitives.

        Args:
          name: Name of the operation.
          operands: Names of all its operands, in the order that its kernels take them.
          results: `(operand avals by name, options)` to result avals.
          reference: `(operands by name, options)` to results, without the dimensions of vmap.
          call: `(operand shapes by name, result shapes, options)` to the sharding declaration.
          kernels: For each platform, `(operand avals by name, result avals, options)` to either
            `(target, extra results, attributes)` or a string, the reason for refusal.
          refuse_fallback: `(options, platform, reason)` raises if the reference is not wanted.
          aliases: `(options)` to the operands that are updated in place, with the index of the
            result that each becomes. They have all dimensions of vmap.
          only_for_aliases: Operands that no result depends on but those updated in place.
          on_shards: `(bind, shards of operands by name, options, call, plan)` to the shards of the
            results, where manual mesh axes are those of `plan`. `bind` applies the operation to
            operands, with these or other options.
        """
        self.name = name
        self._operands = tuple(operands)
        self._reference = _under_vmap(reference)
        self._call = call
        self._kernels = kernels
        self.refuse_fallback = refuse_fallback
        self._on_shards = on_shards
        self._results = results
        self._aliases = aliases
        self._only_for_aliases = frozenset(only_for_aliases)

        self._outer = self._make_primitive(name)
        self._inner = self._make_primitive(f"{name}_local")
        mlir.register_lowering(self._inner, functools.partial(self._lower_local, None))
        for platform in ("cpu", "cuda", "rocm", "tpu"):
            rule = functools.partial(self._lower_local, platform)
            mlir.register_lowering(self._inner, rule, platform=platform)
        mlir.register_lowering(self._outer, self._lower)
        # Partitioning by a Python callback asks for the devices at lowering.
        dispatch.prim_requires_devices_during_lowering.add(self._outer)
        batching.primitive_batchers[self._outer] = self._batch
        ad.primitive_jvps[self._outer] = self._jvp
        self._outer.def_impl(lambda *args, **params: self._compiled(**params)(*args))

    def bind(self, operands: Mapping[str, jax.Array], options: Any) -> tuple[jax.Array, ...]:
        """Applies the operation to operands by name."""
        return self._bind(self._outer, operands, options)

    def _bind(self, primitive: Any, operands: Mapping[str, jax.Array], options: Any) -> Any:
        # Pytrees sort the keys of a dict; the kernel has an order of its own.
        names = tuple(name for name in self._operands if name in operands)
        args = [operands[name] for name in names]
        return tuple(primitive.bind(*args, names=names, options=options))

    def matches(self, primitive: Any) -> bool:
        """Whether a primitive found in a jaxpr is this operation."""
        return primitive is self._outer

    def kernel(self, platform: str, avals: Mapping[str, Aval], options: Any) -> Any:
        """Returns what the kernel of `platform` is called with, or why it is not called."""
        if platform not in self._kernels:
            return f"there is no kernel for {self.name} on {platform}"
        return self._kernels[platform](avals, self._results(avals, options), options)

    def _make_primitive(self, name: str) -> Primitive:
        primitive = Primitive(f"jax_attn_{name}")
        primitive.multiple_results = True
        primitive.def_abstract_eval(
            lambda *avals, names, options: list(
                self._results(dict(zip(names, avals, strict=True)), options)
            )
        )
        return primitive

    @functools.cache  # noqa: B019 - operations live as long as the program
    def _compiled(self, **params: Any) -> Callable[..., Any]:
        return jax.jit(lambda *args: self._outer.bind(*args, **params))

    def _batch(self, args: Sequence[Any], dims: Sequence[Any], *, names: Any, options: Any) -> Any:
        """Puts the mapped dimension in front; operands that lack it stay as they are.

        Dimensions are aligned at the right and broadcast, so an operand only needs dimensions of
        size 1 where an outer vmap maps it and an inner one does not. Nothing is merged into the
        batch: that would move data if the batch is sharded.
        """
        depth = max(
            np.ndim(arg) - (dim is not None) - options.rank(name)
            for name, arg, dim in zip(names, args, dims, strict=True)
        )
        mapped = []
        for name, arg, dim in zip(names, args, dims, strict=True):
            if dim is not None:
                arg = jax.numpy.moveaxis(arg, dim, 0)
                missing = depth + 1 + options.rank(name) - np.ndim(arg)
                arg = lax.expand_dims(arg, range(1, 1 + missing))
            mapped.append(arg)
        extra = [
            np.shape(arg)[: np.ndim(arg) - options.rank(name)]
            for name, arg in zip(names, mapped, strict=True)
        ]
        batch = np.broadcast_shapes(*extra)
        for i, name in enumerate(names):
            if name in self._aliases(options) and extra[i] != batch:
                # Each element of the batch updates a copy of its own.
                core = np.shape(mapped[i])[len(extra[i]) :]
                missing = range(len(batch) - len(extra[i]))
                whole = lax.expand_dims(mapped[i], missing)
                mapped[i] = jax.numpy.broadcast_to(whole, (*batch, *core))
        results = self._outer.bind(*mapped, names=names, options=options)
        return results, [0] * len(results)

    def _jvp(
        self, primals: Sequence[Any], tangents: Sequence[Any], *, names: Any, options: Any
    ) -> Any:
        """Differentiates the reference: for second derivatives, of gradients."""

        def plain(*args: jax.Array) -> list[jax.Array]:
            return list(self._reference(dict(zip(names, args, strict=True)), options))

        return jax.jvp(plain, tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))

    def _lower(self, ctx: Any, *args: Any, names: Any, options: Any) -> Any:
        axes = ctx.module_context.axis_context
        # Under manual axes the operands are shards already, and the partitioner's callback does
        # not work; on one device there is nothing to partition, and without the callback programs
        # can be exported and cached.
        local = bool(getattr(axes, "manual_axes", None)) or getattr(axes, "num_devices", 0) == 1
        if not local:
            self._check_partitioning(ctx, names, options)
        inner = functools.partial(self._inner.bind, names=names, options=options)
        function = inner if local else self._partitioned(names, options)
        return mlir.lower_fun(function, multiple_results=True)(ctx, *args)

    def _check_partitioning(self, ctx: Any, names: tuple[str, ...], options: Any) -> None:
        """Raises what would be an obscure error in XLA's partitioner, or end the process."""
        if ctx.module_context.lowering_parameters.for_export:
            raise NotImplementedError(
                f"{self.name}: jax.export cannot serialize what XLA is left to partition over "
                "several devices. Export a jax.shard_map, or use a mesh of explicit axes."
            )
        # JAX without the option has no other partitioner.
        if not getattr(jax.config, "jax_use_shardy_partitioner", True):
            raise NotImplementedError(
                f"{self.name}: only Shardy can partition it over several devices. Set "
                "jax_use_shardy_partitioner, or call it inside jax.shard_map."
            )
        platform = str(ctx.module_context.platforms[0])
        kernel = self.kernel(platform, dict(zip(names, ctx.avals_in, strict=True)), options)
        if isinstance(kernel, str):
            self.refuse_fallback(options, platform, kernel)

    @functools.cache  # noqa: B019
    def _partitioned(self, names: tuple[str, ...], options: Any) -> Any:
        """The operation on local shards, with its rules for the partitioner."""

        @custom_partitioning
        def local(*args: jax.Array) -> Any:
            return tuple(self._inner.bind(*args, names=names, options=options))

        def call_of(operands: Sequence[Any], results: Sequence[Any]) -> sharding.Call:
            shapes = {name: _shape(x) for name, x in zip(names, operands, strict=True)}
            return self._call(shapes, [_shape(x) for x in results], options)

        def partition(mesh: Any, operands: Any, results: Any) -> Any:
            call = call_of(operands, results)
            specs = {
                name: operand.sharding.spec for name, operand in zip(names, operands, strict=True)
            }
            plan = call.plan(specs, mesh.shape)

            def on_shards(*args: jax.Array) -> tuple[jax.Array, ...]:
                def bind(x: Arrays, own_options: Any = options) -> Any:
                    return self._bind(self._inner, x, own_options)

                shards = dict(zip(names, args, strict=True))
                return tuple(self._on_shards(bind, shards, options, call, plan))

            def shardings(arrays: Mapping[str, Any]) -> tuple[NamedSharding, ...]:
                return tuple(NamedSharding(mesh, call.partition_spec(a, plan)) for a in arrays)

            return (
                mesh,
                on_shards,
                shardings(call.results),
                shardings(call.operands),
            )

        def rule(mesh: Any, operands: Any, results: Any) -> Any:
            del mesh
            return call_of(operands, results).shardy_rule()

        local.def_partition(partition, sharding_rule=rule)
        return local

    def sharded(self, operands: Arrays, options: Any) -> tuple[jax.Array, ...]:
        """Applies the operation; in explicit mode on shards, with sharded types."""
        mesh, axes = explicit_axes()
        if not axes:
            return self.bind(operands, options)
        avals = {name: jax.typeof(x) for name, x in operands.items()}
        results = self._results(avals, options)
        call = self._call(
            {name: aval.shape for name, aval in avals.items()}, [r.shape for r in results], options
        )
        sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
        plan = call.plan({name: aval.sharding.spec for name, aval in avals.items()}, sizes)
        in_specs = {name: call.partition_spec(name, plan) for name in operands}
        out_specs = tuple(call.partition_spec(name, plan) for name in call.results)
        resharded = {name: jax.sharding.reshard(x, in_specs[name]) for name, x in operands.items()}

        def local(shards: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
            def bind(x: Arrays, own_options: Any = options) -> Any:
                # What does not depend on a sharded cache is the same on all devices.
                others = {n: a for n, a in x.items() if n not in self._only_for_aliases}
                return self.bind(varying_alike(x) | varying_alike(others), own_options)

            return tuple(self._on_shards(bind, shards, options, call, plan))

        return jax.shard_map(local, in_specs=(in_specs,), out_specs=out_specs, axis_names=axes)(
            resharded
        )

    def _lower_local(
        self, platform: str | None, ctx: Any, *args: Any, names: Any, options: Any
    ) -> Any:
        avals = dict(zip(names, ctx.avals_in, strict=True))
        platform = platform or str(ctx.module_context.platforms[0])
        kernel = self.kernel(platform, avals, options)
        if isinstance(kernel, str):
            self.refuse_fallback(options, platform, kernel)

            def fallback(*args: jax.Array) -> Any:
                results = self._reference(dict(zip(names, args, strict=True)), options)
                return [r.astype(a.dtype) for r, a in zip(results, ctx.avals_out, strict=True)]

            return mlir.lower_fun(fallback, multiple_results=True)(ctx, *args)
        target, extra_results, attributes = kernel
        avals_out = [*ctx.avals_out, *(ShapedArray(*extra) for extra in extra_results)]
        aliases = {names.index(name): result for name, result in self._aliases(options).items()}
        lowered = jax.ffi.ffi_lowering(target, operand_output_aliases=aliases)(
            ctx.replace(avals_out=avals_out), *args, **attributes
        )
        return lowered[: len(ctx.avals_out)]


def _shape(x: Any) -> tuple[int, ...]:
    """Shape of an operand that the partitioner describes by an aval or an MLIR type."""
    return tuple(x.shape)
