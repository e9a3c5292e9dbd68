# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The machine: what it is, how calls are timed on it, and how fast it can read."""

import concurrent.futures
import dataclasses
import importlib.util
import os
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Instruction sets that decide how fast attention can be, by their name in /proc/cpuinfo.
_ISA_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")

# A GPU is asked for no cache size. Twice the L2 of current NVIDIA parts and the Infinity Cache
# of MI300 are below these.
_GPU_CACHE_BYTES = {"rocm": 256 << 20, "cuda": 64 << 20}

_MAX_SETS = 256
_MAX_SET_BYTES = {"cpu": 3 << 29, "gpu": 4 << 30}

# Bytes that one program moves on a GPU, and its fewest and most calls: starting it hardly counts.
_PROGRAM_BYTES, _PROGRAM_CALLS = 8 << 30, (4, 128)


@dataclasses.dataclass(frozen=True)
class Device:
    """Facts of the machine that JAX computes on by default."""

    platform: str  # "cpu" or "gpu"
    description: str
    last_level_cache: int  # bytes
    num_cores: int
    vendor: str | None = None  # of a GPU: "cuda" or "rocm"

    @classmethod
    def default(cls) -> "Device":
        """Describes JAX's default device."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        if jax.default_backend() == "cpu":
            cache = _cpu_cache_bytes()
            text = f"{_cpu_name()}, {cores} cores, {cache >> 20} MiB last-level cache"
            return cls("cpu", text, cache, cores or 1)
        device = jax.devices()[0]
        vendor = "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
        text = f"{device.device_kind} ({device.client.platform_version.splitlines()[0]})"
        return cls("gpu", text, _GPU_CACHE_BYTES[vendor], cores or 1, vendor)

    def num_sets(self, num_bytes: int, allocated_bytes: int) -> int:
        """Input sets whose rotation leaves nothing of a set in a cache until its next turn."""
        wanted = -(-4 * self.last_level_cache // num_bytes)
        if self.platform == "gpu":  # whose caches may keep a part of what they have no room for
            wanted = max(2, wanted)
        room = max(1, _MAX_SET_BYTES[self.platform] // max(allocated_bytes, 1))
        return max(1, min(wanted, room, _MAX_SETS))

    @property
    def load(self) -> float | None:
        """Processes that want to run on this machine, over its cores; None where not known."""
        return os.getloadavg()[0] / self.num_cores if hasattr(os, "getloadavg") else None

    @property
    def sample_seconds(self) -> float:
        """Time that one sample should take at least: calls shorter than this are averaged."""
        return 2e-4 if self.platform == "cpu" else 1e-2

    @property
    def waits_each_call(self) -> bool:
        """Whether a caller waits for every result. GPU calls are queued, and timed as a queue."""
        return self.platform == "cpu"


def copies(inputs: Any, count: int) -> list[Any]:
    """Returns `inputs` and copies of them in memory of their own, `count` in all."""
    return [inputs, *(jax.tree.map(jnp.copy, inputs) for _ in range(count - 1))]


@dataclasses.dataclass
class Runner:
    """An implementation that is ready to be timed.

    Attributes:
      calls: One function per input set, which are called in rotation.
      wait: Blocks until the result of a call is there.
      steps: Steps that one call does; more than one if a call does all input sets.
    """

    calls: Sequence[Callable[[], Any]]
    wait: Callable[[Any], Any]
    steps: int = 1
    _next: int = 0
    _batch: int = 0

    def turn(self, device: Device, seconds: float) -> list[float]:
        """Runs for about `seconds`, at least once, and returns seconds per step of each sample."""
        # Threads of the implementation that ran before may spin for a while after their last
        # call, and this one's have gone to sleep.
        time.sleep(0.01)
        first = self._sample(device, 1)
        if not self._batch:
            first = self._sample(device, 1)
            self._batch = max(1, int(np.ceil(device.sample_seconds / first)))
        elif first > seconds and device.waits_each_call:
            return [first / self.steps]  # too long for waking threads to matter
        samples = []
        end = time.perf_counter() + seconds
        while not samples or time.perf_counter() < end:
            samples.append(self._seconds_per_call(device) / self.steps)
        return samples

    def _seconds_per_call(self, device: Device) -> float:
        if device.waits_each_call:
            return self._sample(device, self._batch) / self._batch
        # Waking up at the end of a queue takes up to a millisecond, of any queue.
        short = self._sample(device, self._batch)
        return (self._sample(device, 3 * self._batch) - short) / (2 * self._batch)

    def _sample(self, device: Device, num_calls: int) -> float:
        start = time.perf_counter()
        out = None
        for _ in range(num_calls):
            out = self.calls[self._next % len(self.calls)]()
            self._next += 1
            if device.waits_each_call:
                self.wait(out)
        self.wait(out)
        return time.perf_counter() - start


def take_turns(
    runners: dict[str, Runner], device: Device, turns: int, seconds: float
) -> dict[str, list[float]]:
    """Times implementations one after the other, in rounds, so that drift meets all of them.

    One whose calls take longer than its turns leaves after twice its time, with three samples.
    """
    samples: dict[str, list[float]] = {name: [] for name in runners}
    for runner in runners.values():
        runner.turn(device, 0)  # warms up
    for _ in range(turns):
        for name, runner in runners.items():
            if len(samples[name]) < 3 or sum(samples[name]) < 2 * turns * seconds:
                samples[name] += runner.turn(device, seconds)
    return samples


# Read-only passes. Which one is fastest depends on the machine, so all are tried.


def readers(device: Device, num_bytes: int, num_sets: int) -> dict[str, Runner]:
    """Returns passes that read `num_bytes` and do little else, by name."""
    size = max(1, num_bytes // 4)
    found: dict[str, Runner] = {}
    sets = [jnp.ones((size,), jnp.float32) for _ in range(num_sets)]
    if device.platform == "gpu":
        num_calls = calls_in_program(num_bytes)
        found["jnp.mean"] = _scaled_chain(lambda x, scale: jnp.mean(x * scale), sets, num_calls)
        if _has_triton():
            import ceilings_triton

            found |= ceilings_triton.readers(size, num_sets, num_calls)
    else:
        total = jax.jit(jnp.sum)
        found["jnp.sum"] = Runner([lambda x=x: total(x) for x in sets], jax.block_until_ready)
        views = [np.asarray(x) for x in sets]
        found["numpy.max, threads"] = Runner([_threaded_max(x, device) for x in views], _ready)
        if importlib.util.find_spec("torch"):
            import torch

            tensors = [torch.from_dlpack(x) for x in sets]
            found["torch.sum"] = Runner([x.sum for x in tensors], _ready)
    return found


def copiers(device: Device, num_bytes: int, num_sets: int) -> dict[str, Runner]:
    """Returns passes that read half of `num_bytes` and write the other half, by name."""
    size = max(1, num_bytes // 8)
    sets = [jnp.ones((size,), jnp.float32) for _ in range(num_sets)]
    if device.platform == "gpu":
        num_calls = calls_in_program(num_bytes)
        found = {"scale * x": _scaled_chain(lambda x, scale: scale * x, sets, num_calls)}
        if _has_triton():
            import ceilings_triton

            found |= ceilings_triton.copiers(size, num_sets, num_calls)
        return found
    double = jax.jit(lambda x: 2 * x)
    found = {"2 * x": Runner([lambda x=x: double(x) for x in sets], jax.block_until_ready)}
    views = [np.asarray(x) for x in sets]
    copies = [np.ones_like(x) for x in views]
    pairs = list(zip(copies, views, strict=True))
    found["numpy.copyto, threads"] = Runner([_threaded_copy(*p, device) for p in pairs], _ready)
    if importlib.util.find_spec("torch"):
        import torch

        tensors = [
            (torch.from_numpy(to), torch.from_dlpack(x)) for to, x in zip(copies, sets, strict=True)
        ]
        found["torch.copy_"] = Runner([lambda p=p: p[0].copy_(p[1]) for p in tensors], _ready)
    return found


def native_read_bandwidth(device: Device, num_bytes: int) -> float | None:
    """Bytes per second of the CPU module's own read pass, None without one."""
    if device.platform != "cpu":
        return None
    try:
        from jax_attn._native import _cpu
    except ImportError:
        return None
    read_bandwidth = getattr(_cpu, "read_bandwidth", None)
    return None if read_bandwidth is None else float(read_bandwidth(num_bytes))


def calls_in_program(num_bytes: int) -> int:
    """Calls of one program on a GPU, of so many bytes each."""
    fewest, most = _PROGRAM_CALLS
    return min(max(_PROGRAM_BYTES // num_bytes, fewest), most)


def jax_chain(
    fn: Callable[[Any], Any], sets: Sequence[Any], feed: Callable[[Any, Any], Any], num_calls: int
) -> Runner:
    """One compiled program of `num_calls` or more, so that starting programs is not timed.

    The calls take the input sets in turn, and `feed(x, out)` puts the result of a call into the
    inputs of the next: calls of equal inputs XLA does only once. Returns the results of the first
    call and the last. The next program uses their memory again, since XLA records its command
    buffers again for other addresses.
    """
    rounds = -(-num_calls // len(sets))

    def run(old: Any, sets: Sequence[Any]) -> Any:
        del old
        first = out = fn(sets[0])
        for x in ([*sets] * rounds)[1:]:
            # Or XLA would find only the part of a result that is asked for.
            out = fn(feed(x, jax.lax.optimization_barrier(out)))
        return first, out

    compiled = jax.jit(run, donate_argnums=0, keep_unused=True)
    shapes = [jax.eval_shape(fn, sets[0])] * 2
    old = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tuple(shapes))

    def call() -> Any:
        nonlocal old
        old = compiled(old, sets)
        return old

    return Runner([call], jax.block_until_ready, steps=len(sets) * rounds)


def _scaled_chain(
    fn: Callable[..., jax.Array], sets: Sequence[jax.Array], num_calls: int
) -> Runner:
    """The chain of `fn(x, scale)`, where each result gives the next scale, of ones always one."""
    one = jnp.ones((), jnp.float32)
    pairs = [(x, one) for x in sets]
    return jax_chain(
        lambda pair: fn(*pair), pairs, lambda pair, out: (pair[0], out.ravel()[0]), num_calls
    )


_POOL = concurrent.futures.ThreadPoolExecutor()


def _threaded_max(x: np.ndarray, device: Device) -> Callable[[], Any]:
    # NumPy releases the GIL in a reduction, and its float maximum uses all of the SIMD width.
    chunks = np.array_split(x, device.num_cores)
    return lambda: list(_POOL.map(np.max, chunks))


def _threaded_copy(to: np.ndarray, x: np.ndarray, device: Device) -> Callable[[], Any]:
    chunks = [np.array_split(a, device.num_cores) for a in (to, x)]
    return lambda: list(_POOL.map(np.copyto, *chunks))


def _has_triton() -> bool:
    if not importlib.util.find_spec("triton") or not importlib.util.find_spec("torch"):
        return False
    import torch

    return torch.cuda.is_available()


def _ready(_: Any) -> None:
    """Results of synchronous calls are there already."""


def _cpu_name() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    info: dict[str, str] = {}
    for line in lines:
        name, _, text = line.partition(":")
        info.setdefault(name.strip().lower(), text.strip())
    flags = (info.get("flags") or info.get("features") or "").split()
    name = info.get("model name") or platform.machine()
    # Virtual machines shorten the model name; family and model tell the generation.
    generation = f"family {info.get('cpu family')} model {info.get('model')}"
    isa = " ".join(flag for flag in _ISA_FLAGS if flag in flags)
    return f"{name} ({generation}; {isa})"


def _cpu_cache_bytes() -> int:
    sizes = [0]
    for path in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes) or 32 << 20
