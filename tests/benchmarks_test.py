# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark program runs and reports what it should. No time is looked at."""

import dataclasses
import functools
import importlib
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import run

    yield run
    # The folder is no package: its plain module names must not stay behind.
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_report_has_every_field(run, tmp_path, capsys):
    path = tmp_path / "report.json"
    peers = "^(ours_xla|xla_einsum|xla_multiply|jax_nn|onnxruntime)$"
    status = run.main(["--case", "^smoke_f32$", "--peer", peers, "--json", str(path), "--quick"])
    report = json.loads(path.read_text())
    assert status == 0, report
    header = report["header"]
    assert header["device"] and header["commit"] and header["date"]
    assert {"python", "jax", "jaxlib", "torch", "jax_attn"} <= header["versions"].keys()
    rows = {row["peer"]: row for row in report["results"]}
    assert {"ours_xla", "xla_einsum", "xla_multiply", "jax_nn"} <= rows.keys()
    for row in rows.values():
        assert row["status"] == "timed", row
        assert row["case"] == "smoke_f32" and row["samples"] > 0
        assert row["bytes"] == 4 * (2 * 2 * 50 * 2 * 32 + 2 * 2 * 4 * 32)
        assert row["error"] < 1e-5
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["gb_per_s"] > 0 and row["ceiling_gb_per_s"] > 0
        assert row["fraction_of_ceiling"] > 0 and row["ratio_to_ours"] is None
    assert "smoke_f32" in capsys.readouterr().out


def test_paged_and_quantised_caches_agree(run, tmp_path):
    path = tmp_path / "report.json"
    cases = "smoke_(page16|int8)"
    peers = "^(ours_native|ours_xla|xla_einsum)$"
    assert run.main(["--case", cases, "--peer", peers, "--json", str(path), "--quick"]) == 0
    rows = json.loads(path.read_text())["results"]
    assert {row["case"] for row in rows} == {"smoke_page16", "smoke_int8"}
    assert {row["status"] for row in rows} <= {"timed", "missing"}


def expected_of(run, case, x):
    return np.asarray(run.peers.ours(case, x, "xla"))


def test_queued_calls_give_the_same_results(run, monkeypatch):
    # A GPU is timed by one program that does all input sets; it runs on CPU too.
    monkeypatch.setattr(run.device_lib, "_PROGRAM_CALLS", (4, 8))
    (case,) = run.select("smoke_f32", None)
    sets = [run.cases.make_inputs(case, seed) for seed in range(3)]
    queue = run.device_lib.Device("gpu", "", 1 << 20, 1)
    (peer,) = [peer for peer in run.peers.PEERS if peer.name == "ours_xla"]
    runner = peer.prepare(case, queue, sets)
    assert runner.steps == 9  # 8 or more, in whole rounds
    query = sets[0].query
    for i in range(runner.steps):  # each takes the result of the one before
        query = run.peers.ours(case, dataclasses.replace(sets[i % 3], query=query), "xla")
    for _ in range(2):  # a program's results are the next one's memory
        out = runner.calls[0]()
        error = run.relative_error(peer.output(out), expected_of(run, case, sets[0]))
        assert error < 1e-5
        assert run.relative_error(np.asarray(out[1]), np.asarray(query)) < 1e-4


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("page_size", [None, 16])
def test_pallas_agrees(run, monkeypatch, page_size):
    gpu = pytest.importorskip("jax.experimental.pallas.ops.gpu")
    for module, name in (("decode_attention", "gqa"), ("paged_attention", "paged_attention")):
        module = importlib.import_module(f"{gpu.__name__}.{module}")
        kernel = functools.partial(getattr(module, name), interpret=True)
        monkeypatch.setattr(module, name, kernel)
    case = run.cases.Case("none", "none", 2, 8, 2, 256, 64, page_size=page_size)
    x = run.cases.make_inputs(case, 0)
    with jax.numpy_dtype_promotion("standard"):  # the tests have a stricter one
        out = run.peers.pallas(case, run.peers.heads_first(case, x), k_splits=4)
    error = run.relative_error(np.asarray(out).astype(np.float32), run.peers.expected(case, x))
    assert error <= run.tolerance(case)


def test_fused_qkv_peers_agree(run, tmp_path):
    path = tmp_path / "report.json"
    peers = "^(ours_native|ours_xla)$"
    assert run.main(["--case", "qkv_smoke", "--peer", peers, "--json", str(path), "--quick"]) == 0
    rows = json.loads(path.read_text())["results"]
    assert {row["peer"] for row in rows} == {"ours_native", "ours_xla"}
    assert {row["status"] for row in rows} <= {"timed", "missing"}
    for row in rows:
        # 12 heads of 32 read and written, 4 stored.
        assert row["bytes"] == 5 * 4 * 32 * (12 + 12 + 4) and row["ceiling_by"]


def test_case_names_are_unique(run):
    names = [case.name for case in run.CASES]
    assert len(names) == len(set(names))


def test_wrong_result_is_reported_and_not_timed(run, monkeypatch, tmp_path):
    path = tmp_path / "report.json"
    monkeypatch.setattr(run, "relative_error", lambda out, expected: 1.0)
    status = run.main(
        ["--case", "smoke_f32", "--peer", "xla_einsum", "--json", str(path), "--quick"]
    )
    (row,) = json.loads(path.read_text())["results"]
    assert status == 1
    assert row["status"] == "wrong" and "median_ms" not in row


@pytest.mark.parametrize("packed", ["", "_packed"])
def test_small_sequences(run, tmp_path, packed):
    import small_seq

    path = tmp_path / "report.json"
    case = f"^b8_kv4_h64_n4{packed}_(forward|both)$"
    arguments = ["--case", case, "--peer", "ours_xla|xla_einsum", "--json", str(path), "--quick"]
    assert small_seq.main(arguments) == 0
    rows = json.loads(path.read_text())["results"]
    timed = [row for row in rows if row["status"] == "timed"]
    assert len(timed) == (2 if packed else 4)
    assert {row["bytes"] for row in timed} == {2 * 8 * 4 * 64 * n for n in (2 + 8, 5 + 24)}
    names = [case.name for case in small_seq.CASES]
    assert len(names) == len(set(names))


def test_small_sequences_with_groups_of_heads(run, tmp_path):
    import small_seq

    path = tmp_path / "report.json"
    arguments = ["--case", "^b8_.*_k2_q3_both$", "--peer", "xla_einsum", "--json", str(path)]
    assert small_seq.main([*arguments, "--quick"]) == 0
    (row,) = json.loads(path.read_text())["results"]
    assert (row["status"], row["bytes"]) == ("timed", 2 * 8 * 64 * (5 * 3 * 4 + 6 * 4 * 2))


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_small_sequences_that_are_wrong(run, tmp_path, monkeypatch, factor):
    import small_seq

    path = tmp_path / "report.json"

    def wrong(*arrays):
        return factor * small_seq.einsum(*arrays)

    monkeypatch.setitem(small_seq.JAX_PEERS, "xla_einsum", lambda case: wrong)
    arguments = ["--case", "^b8_kv4_h64_n4_forward$", "--peer", "xla_einsum", "--json", str(path)]
    assert small_seq.main([*arguments, "--quick"]) == 1
    (row,) = json.loads(path.read_text())["results"]
    assert row["status"] == "wrong" and "median_ms" not in row


def test_sharded_attention(run, tmp_path):
    import sharded

    path = tmp_path / "report.json"
    assert sharded.main(["--quick", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["results"]
    assert [(row["devices"], row["arrangement"]) for row in rows] == [
        (1, "heads"),
        *[(2, name) for name in ("heads", "contexts", "not merged")],
    ]
    assert all(row["median_us"] > 0 for row in rows)


def test_decoding_step(run, tmp_path):
    import decode_step

    path = tmp_path / "report.json"
    assert decode_step.main(["--quick", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["results"]
    assert [row["implementation"] for row in rows] == ["jax_attn", "XLA"]
    assert all(0 < row["min_us"] <= row["median_us"] for row in rows)
    names = [
        "jax_attn::gpu::FusedQkv",
        "jax_attn::gpu::Merge",
        "nvjet_hsh_64x8",
        "MemcpyD2D",
        "fusion_3",
    ]
    assert [decode_step.kind_of(kernel) for kernel in names] == [
        "fused QKV",
        "attention",
        "matrix products",
        "copies",
        "other",
    ]
