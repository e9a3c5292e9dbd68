# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding: tables of cosines and sines, and how they are applied."""

import dataclasses
import math
from typing import Any, Literal, Self, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np

TableWidth = Literal["half", "full"]
TABLE_WIDTHS: tuple[TableWidth, ...] = ("half", "full")


class RopeOptions(TypedDict, total=False):
    """The static fields of `Rope` that do not follow from its table."""

    interleaved: bool
    nope_first: bool
    mrope_sections: tuple[int, int, int] | None
    mrope_interleaved: bool


_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021) by tables.

    Dims are rotated in pairs: `(x1, x2)` becomes `(x1 * cos - x2 * sin, x2 * cos + x1 * sin)`,
    in float32. Every scaling scheme is a different table; the constructors build the usual ones
    in float64 and round once.

    The pytree does not check itself, since JAX rebuilds it around tracers; operations do.

    Attributes:
      cos: `[max_positions, width]`, float32, bfloat16 or float16, factors of the scheme included.
      sin: Like `cos`.
      interleaved: Pairs are neighbours `(2i, 2i + 1)` (GPT-J) instead of `(i, i + rotary_dim / 2)`
        (NeoX, Llama).
      rotary_dim: Dims of a head that are rotated; the rest pass. The whole head if None.
      nope_first: The rotated dims are the last ones of the head instead of the first.
      table_width: "half": a table entry per pair. "full": an entry per rotated dim, in the order
        of the dims, as Hugging Face's `cos` and `sin` are.
      mrope_sections: Pairs that turn with the temporal, height and width position (M-RoPE;
        Wang et al. 2024); they sum to `rotary_dim / 2`, and positions are `[3, tokens]`. None for
        one position per token.
      mrope_interleaved: Sections alternate, t h w t h w ..., as far as those of h and w reach
        (Qwen3-VL), instead of following each other (Qwen2-VL).
    """

    cos: jax.Array
    sin: jax.Array
    interleaved: bool = dataclasses.field(default=False, metadata=_STATIC)
    rotary_dim: int | None = dataclasses.field(default=None, metadata=_STATIC)
    nope_first: bool = dataclasses.field(default=False, metadata=_STATIC)
    table_width: TableWidth = dataclasses.field(default="half", metadata=_STATIC)
    mrope_sections: tuple[int, int, int] | None = dataclasses.field(default=None, metadata=_STATIC)
    mrope_interleaved: bool = dataclasses.field(default=False, metadata=_STATIC)

    @classmethod
    def packed(cls, table: jax.Array, **options: Unpack[RopeOptions]) -> Self:
        """Makes a `Rope` of a packed table, as vLLM and FlashInfer have it.

        Args:
          table: `[max_positions, rotary_dim]`, cosines in the first half of the columns and
            sines in the second.
          **options: `interleaved`, `nope_first`, `mrope_sections`, `mrope_interleaved`.

        Raises:
          ValueError: Unless the table has two dimensions and an even number of columns.
        """
        if np.ndim(table) != 2 or np.shape(table)[1] % 2:
            raise ValueError(
                "Rope.packed: `table` must have shape [max_positions, rotary_dim] with an even "
                f"rotary_dim, got shape {np.shape(table)}."
            )
        rotary_dim = table.shape[1]
        cos, sin = table[:, : rotary_dim // 2], table[:, rotary_dim // 2 :]
        return cls(cos, sin, rotary_dim=rotary_dim, **options)

    @classmethod
    def from_frequencies(
        cls,
        frequencies: Any,
        max_positions: int,
        *,
        attention_factor: float = 1.0,
        dtype: Any = jnp.float32,
        **options: Unpack[RopeOptions],
    ) -> Self:
        """Makes the tables `attention_factor * cos(position * frequency)`, and sines.

        Args:
          frequencies: Angle of a pair per position, `[rotary_dim / 2]`; not traced. 0 keeps a pair
            (Gemma 4's proportional RoPE).
          max_positions: Rows of the tables.
          attention_factor: Factor on queries and keys (YaRN, LongRoPE).
          dtype: Dtype of the tables.
          **options: `interleaved`, `nope_first`, `mrope_sections`, `mrope_interleaved`.
        """
        frequencies = np.asarray(frequencies, np.float64)
        angles = np.arange(max_positions, dtype=np.float64)[:, None] * frequencies[None, :]
        return cls(
            jnp.asarray((attention_factor * np.cos(angles)).astype(np.float32)).astype(dtype),
            jnp.asarray((attention_factor * np.sin(angles)).astype(np.float32)).astype(dtype),
            rotary_dim=2 * len(frequencies),
            **options,
        )

    @classmethod
    def default(
        cls,
        rotary_dim: int,
        max_positions: int,
        *,
        theta: float = 10000.0,
        dtype: Any = jnp.float32,
        **options: Unpack[RopeOptions],
    ) -> Self:
        """Makes the tables of plain RoPE: frequency `theta ** (-2i / rotary_dim)`."""
        return cls.from_frequencies(
            _frequencies("Rope.default", rotary_dim, theta), max_positions, dtype=dtype, **options
        )

    @classmethod
    def linear(
        cls,
        rotary_dim: int,
        max_positions: int,
        *,
        factor: float,
        theta: float = 10000.0,
        dtype: Any = jnp.float32,
        **options: Unpack[RopeOptions],
    ) -> Self:
        """Makes the tables of position interpolation (Chen et al. 2023): frequencies / factor."""
        frequencies = _frequencies("Rope.linear", rotary_dim, theta) / factor
        return cls.from_frequencies(frequencies, max_positions, dtype=dtype, **options)

    @classmethod
    def llama3(
        cls,
        rotary_dim: int,
        max_positions: int,
        *,
        theta: float = 500000.0,
        factor: float = 8.0,
        low_freq_factor: float = 1.0,
        high_freq_factor: float = 4.0,
        original_max_positions: int = 8192,
        dtype: Any = jnp.float32,
        **options: Unpack[RopeOptions],
    ) -> Self:
        """Makes the tables of Llama 3.1.

        Pairs that turn more than `high_freq_factor` times in the original context keep their
        frequency, those that turn less than `low_freq_factor` times are slowed by `factor`, and
        those between are interpolated.
        """
        frequencies = _frequencies("Rope.llama3", rotary_dim, theta)
        turns = original_max_positions * frequencies / (2 * math.pi)
        keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
        keep = np.clip(keep, 0, 1)
        frequencies = frequencies * (keep + (1 - keep) / factor)
        return cls.from_frequencies(frequencies, max_positions, dtype=dtype, **options)

    @classmethod
    def yarn(
        cls,
        rotary_dim: int,
        max_positions: int,
        *,
        factor: float,
        original_max_positions: int,
        theta: float = 10000.0,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        attention_factor: float | None = None,
        mscale: float | None = None,
        mscale_all_dim: float | None = None,
        truncate: bool = True,
        dtype: Any = jnp.float32,
        **options: Unpack[RopeOptions],
    ) -> Self:
        """Makes the tables of YaRN (Peng et al. 2023).

        Args:
          rotary_dim: Dims that are rotated.
          max_positions: Rows of the tables.
          factor: Extension of the context.
          original_max_positions: The context of pretraining.
          theta: Base of the frequencies.
          beta_fast: Pairs that turn more often than this in the original context keep their
            frequency.
          beta_slow: Pairs that turn less often are slowed by `factor`.
          attention_factor: Factor on queries and keys. If None, `0.1 * ln(factor) + 1`, or the
            ratio of `0.1 * m * ln(factor) + 1` for the two mscales (DeepSeek).
          mscale: The m of the numerator.
          mscale_all_dim: The m of the denominator.
          truncate: Round the bounds of the ramp to whole pairs (False in gpt-oss).
          dtype: Dtype of the tables.
          **options: `interleaved`, `nope_first`, `mrope_sections`, `mrope_interleaved`.
        """
        if attention_factor is None:
            attention_factor = _yarn_attention_factor(factor, mscale, mscale_all_dim)

        def pair_that_turns(times: float) -> float:
            ratio = original_max_positions / (times * 2 * math.pi)
            return rotary_dim * math.log(ratio) / (2 * math.log(theta))

        low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
        if truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        if low == high:
            high += 0.001  # a step instead of a ramp
        slow = np.clip((np.arange(rotary_dim // 2) - low) / (high - low), 0, 1)
        frequencies = _frequencies("Rope.yarn", rotary_dim, theta)
        return cls.from_frequencies(
            frequencies * (1 - slow + slow / factor),
            max_positions,
            attention_factor=attention_factor,
            dtype=dtype,
            **options,
        )


def _frequencies(op: str, rotary_dim: int, theta: float) -> np.ndarray:
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(f"{op}: rotary_dim must be positive and even, got {rotary_dim}.")
    return float(theta) ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


def _yarn_attention_factor(
    factor: float, mscale: float | None, mscale_all_dim: float | None
) -> float:
    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)
