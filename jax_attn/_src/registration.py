# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Loads the native modules that were built and registers their handlers with XLA."""

import functools
import importlib
import pathlib
import re
import types
import warnings

import jax

# Platform as lowering names it: (module, platform as the FFI registry spells it).
_MODULES = {
    "cpu": ("jax_attn._native._cpu", "cpu"),
    "cuda": ("jax_attn._native._cuda", "CUDA"),
    "rocm": ("jax_attn._native._rocm", "ROCM"),
}

# What the kernels of a platform are called.
VENDORS = {"cpu": "CPU", "cuda": "CUDA", "rocm": "ROCm"}


@functools.cache
def native_module(platform: str) -> types.ModuleType | None:
    """Returns the native module of `platform`, its handlers registered; None if there is none.

    A handler that was built for a newer FFI than the running jaxlib's is not registered: it
    would fail, and take every handler queued after it, of other packages too, down with it.
    """
    if platform not in _MODULES:
        return None
    name, registry_platform = _MODULES[platform]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None
    built, running = module.ffi_api_version, runtime_ffi_api_version()
    if built[0] != running[0] or built[1] > running[1]:
        warnings.warn(
            f"jax_attn: the {platform} kernels were built for XLA FFI {built[0]}.{built[1]}, but "
            f"this jaxlib has {running[0]}.{running[1]}; using jax.numpy instead. Reinstall "
            "jax_attn, or update jaxlib.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    for target, handler in module.handlers().items():
        jax.ffi.register_ffi_target(target, handler, platform=registry_platform)
    return module


def missing(platform: str) -> str:
    """Returns why `native_module` returns None for a platform."""
    return f"the {VENDORS[platform]} kernels are not installed, or too new for this jaxlib"


def variant_of(platform: str, chosen: str) -> str | None:
    """Returns the variant of an operation with one for all problems; None without kernels."""
    module = native_module(platform)
    if module is None:
        return None
    if platform != "cpu":
        return chosen or "vector"
    return module.instruction_set(chosen or module.variants()[0])


def runtime_ffi_api_version() -> tuple[int, int]:
    """Returns the major and minor version of the FFI that the running jaxlib was built with."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header))
    return int(found["MAJOR"]), int(found["MINOR"])


def platforms() -> tuple[str, ...]:
    """Returns the platforms that this installation has compiled kernels for, such as "cpu"."""
    return tuple(platform for platform in _MODULES if native_module(platform) is not None)
