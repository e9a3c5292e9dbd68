# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Which code an operation runs.

"native" is the compiled kernel or an error, "xla" the jax.numpy reference, and None the kernel
where this installation and the platform have one for the case. It is decided at lowering, where
the platform is known.
"""

from typing import Literal

Implementation = Literal["native", "xla"]
IMPLEMENTATIONS: tuple[Implementation | None, ...] = ("native", "xla", None)


def refuse_fallback(
    op: str, implementation: Implementation | None, platform: str, reason: str
) -> None:
    """Raises if the compiled kernel of `op` was asked for, which is not used for `reason`."""
    if implementation == "native":
        raise NotImplementedError(
            f'{op}: implementation="native" cannot be used on {platform}: {reason}. '
            "Use implementation=None to fall back to jax.numpy."
        )
