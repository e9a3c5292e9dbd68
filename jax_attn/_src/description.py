# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""What an operation says of one of its calls, for `explain`."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Description:
    """What `explain` tells of a call besides which implementation runs.

    Attributes:
      op: Public name of the operation.
      bytes_moved: What has to be read and written at least.
      variant: Variant of the kernel; None without one.
      num_splits: Parts that a context is cut into; None where there are no parts.
      caches: Types of the arrays whose copies are counted.
    """

    op: str
    bytes_moved: int
    variant: str | None
    num_splits: int | None
    caches: tuple[Any, ...]
