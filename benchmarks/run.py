# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Times this package and its peers, and how fast the machine can read or copy.

    python benchmarks/run.py [--case REGEX] [--peer REGEX] [--json FILE] [--plot FILE] [--quick]

The ceiling of a case is a pass that only reads (attention) or copies (fused QKV) as many bytes as
the case must move, in turn with the implementations. Results are compared with a float32 reference
before anything is timed.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import cases
import device as device_lib
import fused_qkv
import numpy as np
import peers
import plot

# Relative Frobenius errors that rounding explains: of 16-bit probabilities and results, and of
# float32 sums in another order (GPU matrix units round float32 inputs further).
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 2e-3}

# An implementation's share of a case: this many turns of so many seconds. A GPU's are one sample.
TURNS, TURN_SECONDS = 10, {"cpu": 0.15, "gpu": 0.02}
QUICK_TURNS, QUICK_TURN_SECONDS = 3, 0.01
QUICK_MAX_BYTES = 150 << 20


@dataclasses.dataclass(frozen=True)
class Operation:
    """What is timed: problems of one operation and its implementations.

    Attributes:
      cases: The problems.
      peers: The implementations.
      make_inputs: `(case, seed)` to the arrays of a case.
      expected: `(case, inputs)` to what implementations must return.
      ceilings: `(device, bytes, input sets)` to passes that only move bytes, by name.
      moves: What such a pass does.
    """

    cases: Sequence[Any]
    peers: Sequence[peers.Peer]
    make_inputs: Callable[[Any, int], Any]
    expected: Callable[[Any, Any], np.ndarray]
    ceilings: Callable[[device_lib.Device, int, int], dict[str, device_lib.Runner]]
    moves: str


OPERATIONS = (
    Operation(
        cases.CASES,
        peers.PEERS,
        cases.make_inputs,
        peers.expected,
        device_lib.readers,
        "read",
    ),
    Operation(
        fused_qkv.CASES,
        fused_qkv.PEERS,
        fused_qkv.make_inputs,
        fused_qkv.expected,
        device_lib.copiers,
        "copy",
    ),
)
CASES = [case for operation in OPERATIONS for case in operation.cases]

# Load per core above which timings say more about other processes.
MAX_LOAD = 0.3


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 if an implementation failed or was wrong."""
    arguments = _parse(argv)
    device = device_lib.Device.default()
    header = describe(device)
    print_header(header)

    missing: list[dict[str, str]] = []
    results = []
    selected = select(arguments.case, device)
    for operation in OPERATIONS:
        own = [case for case in selected if case in operation.cases]
        chosen = []
        for peer in operation.peers if own else ():
            if re.search(arguments.peer, peer.name):
                reason = peer.missing(device)
                chosen += [peer] if reason is None else []
                missing += [] if reason is None else [{"peer": peer.name, "reason": reason}]
                if reason is not None:
                    print(f"missing   {peer.name}: {reason}")
        for case in own:
            if arguments.quick and case.allocated_bytes > QUICK_MAX_BYTES:
                print(f"\n{case.name}: left out by --quick", flush=True)
                continue
            rows = measure(operation, case, chosen, device, arguments.quick)
            print_case(case, rows)
            results += rows
            if arguments.json:  # after each case, so that a run that is cut short leaves something
                report = {
                    "header": header | {"quick": arguments.quick, "missing": missing},
                    "results": results,
                }
                pathlib.Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        plot.draw(header, results, arguments.plot)
    return int(any(row["status"] in ("wrong", "failed") for row in results))


def select(pattern: str | None, device: device_lib.Device) -> list[Any]:
    """Cases whose name matches; without a pattern, those meant for the platform."""
    if pattern is None:
        return [case for case in CASES if device.platform in case.platforms]
    return [case for case in CASES if re.search(pattern, case.name)]


def measure(
    operation: Operation,
    case: Any,
    chosen: Sequence[peers.Peer],
    device: device_lib.Device,
    quick: bool,
) -> list[dict[str, Any]]:
    """Checks and times the implementations of a case, and returns a row for each."""
    num_sets = device.num_sets(case.num_bytes, case.allocated_bytes) if case.rotate else 1
    sets = device_lib.copies(operation.make_inputs(case, 0), num_sets)
    expected = operation.expected(case, sets[0])
    rows: list[dict[str, Any]] = []
    runners: dict[str, device_lib.Runner] = {}
    for peer in chosen:
        row = _identity(case, peer, num_sets)
        rows.append(row)
        reason = peer.unsupported(case)
        if reason is not None:
            row |= {"status": "unsupported", "reason": reason}
            continue
        try:
            runner = peer.prepare(case, device, sets)
            out = runner.calls[0]()
            runner.wait(out)
            error = relative_error(peer.output(out), expected)
        except NotImplementedError as e:
            row |= {"status": "missing", "reason": str(e)}
        except Exception as e:  # a peer's failure is a result, and must not end the run
            row |= {"status": "failed", "reason": f"{type(e).__name__}: {e}"}
        else:
            row["error"] = error
            if error <= tolerance(case):
                runners[peer.name] = runner
                row["status"] = "timed"
            else:
                row |= {"status": "wrong", "reason": f"relative error {error:.1e}"}
    num_turns, seconds = turns(device, quick)
    ceilings = operation.ceilings(device, case.num_bytes, num_sets)
    samples = device_lib.take_turns(runners | ceilings, device, num_turns, seconds)

    rates = {name: case.num_bytes / float(np.median(samples[name])) for name in ceilings}
    native = device_lib.native_read_bandwidth(device, case.num_bytes)
    if native is not None and operation.moves == "read":
        rates["native"] = native
    fastest = max(rates, key=lambda name: rates[name])
    ours = samples.get(peers.OURS)
    for row in rows:
        if row["status"] == "timed":
            row |= statistics(samples[row["peer"]], case.num_bytes, rates[fastest], ours)
            row["ceiling_by"] = fastest
    return rows


def turns(device: device_lib.Device, quick: bool) -> tuple[int, float]:
    """An implementation's turns, and the seconds of each."""
    if quick:
        return QUICK_TURNS, QUICK_TURN_SECONDS
    return TURNS, TURN_SECONDS[device.platform]


def tolerance(case: Any) -> float:
    """Relative error that rounding explains; of the formats of 8 bits it is larger."""
    stored = case.stored_dtype
    return max(TOLERANCE[case.dtype], TOLERANCE.get(stored, 0) if stored in TOLERANCE else 0.05)


def relative_error(out: np.ndarray, expected: np.ndarray) -> float:
    """Relative Frobenius error; infinite for another shape or a NaN."""
    if out.shape != expected.shape or not np.isfinite(out).all():
        return float("inf")
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))


def describe(device: device_lib.Device) -> dict[str, Any]:
    """What the results depend on: machine, versions, commit, date."""
    packages = {"jax_attn": "jax-attn"} | {n: n for n in ("jax", "jaxlib", "torch", "onnxruntime")}
    versions = {name: _version(package) for name, package in packages.items()}
    return {
        "device": device.description,
        "platform": device.platform,
        "cores": device.num_cores,
        "load_per_core": device.load,
        "versions": {"python": platform.python_version()} | versions,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def print_header(header: dict[str, Any]) -> None:
    """Prints what the results depend on."""
    print(f"device    {header['device']}")
    versions = [
        f"{name} {version or 'not installed'}" for name, version in header["versions"].items()
    ]
    print(f"versions  {', '.join(versions)}")
    print(f"commit    {header['commit']}, {header['date']}", flush=True)
    if header["load_per_core"] is not None and header["load_per_core"] > MAX_LOAD:
        print(f"WARNING   not an idle machine: load {header['load_per_core']:.1f} per core")


def print_case(case: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Prints the table of a case."""
    print_rows(f"{case.name} ({case.model}): {case.num_bytes / 1e6:.1f} MB", rows)


def print_rows(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints a table of implementations."""
    timed = [row for row in rows if row["status"] == "timed"]
    ceiling = ""
    if timed:
        ceiling = f"; ceiling {timed[0]['ceiling_gb_per_s']:.1f} GB/s ({timed[0]['ceiling_by']})"
    print(f"\n{title}{ceiling}")
    columns = ("median ms", "p10", "p90", "GB/s", "ceiling", "vs ours")
    print(f"  {'':<18}" + "".join(f"{column:>11}" for column in columns))
    for row in rows:
        if row["status"] != "timed":
            print(f"  {row['peer']:<18}  {row['status']}: {row['reason']}")
            continue
        ratio = row["ratio_to_ours"]
        cells = [f"{row[name]:.4g}" for name in ("median_ms", "p10_ms", "p90_ms")]
        cells += [f"{row['gb_per_s']:.1f}", f"{row['fraction_of_ceiling']:.1%}"]
        cells += ["-" if ratio is None else f"{ratio:.2f}x"]
        print(f"  {row['peer']:<18}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


def _identity(case: Any, peer: peers.Peer, num_sets: int) -> dict[str, Any]:
    return {
        "case": case.name,
        "model": case.model,
        "peer": peer.name,
        "title": peer.title,
        **case.shape,
        "dtype": case.dtype,
        "cache_dtype": case.stored_dtype,
        "bytes": case.num_bytes,
        "input_sets": num_sets,
    }


def statistics(
    samples: list[float], num_bytes: int, ceiling: float, ours: list[float] | None
) -> dict[str, Any]:
    """Describes samples of a case that moves `num_bytes`, beside those of this package."""
    p10, median, p90 = (float(t) for t in np.percentile(samples, (10, 50, 90)))
    return {
        "samples": len(samples),
        "median_ms": 1e3 * median,
        "p10_ms": 1e3 * p10,
        "p90_ms": 1e3 * p90,
        "gb_per_s": num_bytes / median / 1e9,
        "ceiling_gb_per_s": ceiling / 1e9,
        "fraction_of_ceiling": num_bytes / median / ceiling,
        "ratio_to_ours": None if ours is None else median / float(np.median(ours)),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    root = pathlib.Path(__file__).resolve().parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times attention decode and its peers.")
    parser.add_argument("--case", help="cases whose name contains this regular expression")
    parser.add_argument("--peer", default="", help="implementations, likewise")
    parser.add_argument("--json", help="write results to this file")
    parser.add_argument("--plot", help="draw results to this file (.png or .svg)")
    parser.add_argument("--quick", action="store_true", help="few samples, no large case")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
