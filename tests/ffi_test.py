# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""`jax_attn.ffi`, registration of handlers, and life without them."""

import re
import subprocess
import sys
import textwrap
import warnings

import ffi_call
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_attn
from jax_attn._src import registration

TARGET = "jax_attn_split_kv_attention"
NATIVE = "cpu" in jax_attn.platforms()
needs_native = pytest.mark.skipif(
    not NATIVE, reason="this build of jax_attn has no kernels for the CPU"
)

SIZES = {
    **{"batch": 2, "query_len": 3, "num_q_heads": 4, "num_kv_heads": 2},
    **{"head_dim": 64, "v_head_dim": 64, "kv_len": 4096},
}


def attend(query, key, lengths):
    return jax_attn.split_kv_attention(query, key, key, kv_lengths=lengths)


def inputs():
    rng = np.random.default_rng(0)
    query, key = (rng.standard_normal((2, n, 2, 8)).astype(np.float32) for n in (1, 40))
    return jnp.asarray(query), jnp.asarray(key), jnp.array([40, 7], jnp.int32)


# ---- What the module says


@needs_native
def test_register():
    assert jax_attn.ffi.register() == jax_attn.platforms()
    assert "cpu" in jax_attn.ffi.register()  # again


@needs_native
def test_handlers():
    handlers = jax_attn.ffi.handlers("cpu")
    assert TARGET in handlers
    for name, capsule in handlers.items():
        assert re.fullmatch("jax_attn_[a-z_]+", name)
        assert type(capsule).__name__ == "PyCapsule"
        # Under another name of one's own they work as well.
        jax.ffi.register_ffi_target(f"test_{name}", capsule, platform="cpu")


@needs_native
def test_capabilities():
    rows = jax_attn.ffi.capabilities()
    assert len({(row["op"], row["platform"]) for row in rows}) == len(rows)
    for row in rows:
        assert row["platform"] in jax_attn.platforms()
        assert hasattr(jax_attn, row["op"])
    assert "split_kv_attention" in {row["op"] for row in rows}


@pytest.mark.parametrize("platform", ["quantum", "tpu", "", "CPU"])
@pytest.mark.parametrize(
    "function",
    [
        jax_attn.ffi.handlers,
        jax_attn.ffi.variants,
        lambda platform: jax_attn.ffi.split_kv_workspace_size(platform, **SIZES),
    ],
    ids=["handlers", "variants", "split_kv_workspace_size"],
)
def test_unknown_platform(function, platform):
    message = (
        f"jax_attn.ffi: there are no handlers for {platform!r}; this installation has them for "
        f"{jax_attn.platforms()}."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function(platform)


@needs_native
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be at least 1, got 0."),
        ({"num_kv_heads": 3}, ValueError, "num_q_heads=4 is not a multiple of num_kv_heads=3."),
        ({"batch": -1}, ValueError, "batch must be at least 0, got -1."),
        ({"kv_len": -5}, ValueError, "kv_len must be at least 0, got -5."),
        ({"num_splits": -1}, ValueError, "num_splits must be at least 0, got -1."),
        ({"head_dim": 64.0}, TypeError, "head_dim must be int, got float."),
        ({"split_size": None}, TypeError, "split_size must be int, got NoneType."),
        (
            {"page_layout": "nhd"},
            ValueError,
            "page_layout must be 'NHD', 'HND' or None, got 'nhd'.",
        ),
    ],
)
def test_workspace_size_errors(changes, error, message):
    with pytest.raises(error, match=f"^split_kv_workspace_size: {re.escape(message)}$"):
        jax_attn.ffi.split_kv_workspace_size("cpu", **{**SIZES, **changes})


@needs_native
def test_workspace_sizes():
    def size(**changes):
        return jax_attn.ffi.split_kv_workspace_size("cpu", **{**SIZES, **changes})

    # Partial results: 2 sequences x 2 kv heads x 3 x 2 rows x (64 values, maximum, sum).
    partial = 2 * 2 * 6 * 66
    assert size(num_splits=3) - size(num_splits=1) == 3 * partial
    assert size(num_splits=4) - size(num_splits=3) == partial
    assert size(split_size=1024) == size(num_splits=4)
    assert size(split_size=4096) == size(num_splits=1)
    assert size(batch=4, num_splits=3) - size(batch=2, num_splits=3) == 3 * partial
    assert size(batch=0) == size(query_len=0) == size(num_q_heads=0) == 0
    # The length of the contexts does not matter to what is not split.
    assert size(num_splits=1, kv_len=1 << 30) == size(num_splits=1)


# ---- Calling and exporting


@needs_native
def test_example(capsys):
    assert ffi_call.main() < 1e-5
    printed = capsys.readouterr().out
    assert "registered for: cpu" in printed
    assert "largest difference from jax.numpy:" in printed


@needs_native
def test_export_round_trip():
    args = inputs()
    expected = attend(*args)
    with pytest.raises(ValueError, match=TARGET):
        jax.export.export(jax.jit(attend))(*args)
    exported = jax.export.export(jax.jit(attend), disabled_checks=jax_attn.ffi.export_checks())(
        *args
    )
    assert TARGET in exported.mlir_module()
    restored = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(restored.call(*args), expected)


@needs_native
def test_an_exported_program_runs_in_a_process_that_traced_nothing(tmp_path):
    args = inputs()
    checks = jax_attn.ffi.export_checks()
    exported = jax.export.export(jax.jit(attend), disabled_checks=checks)(*args)
    (tmp_path / "program").write_bytes(exported.serialize())
    np.savez(tmp_path / "arrays.npz", *args, attend(*args))
    done = run(
        f"""
        import pathlib
        import jax, jax.numpy as jnp, numpy as np
        import jax_attn

        folder = pathlib.Path({str(tmp_path)!r})
        *args, expected = np.load(folder / "arrays.npz").values()
        program = jax.export.deserialize(bytearray((folder / "program").read_bytes()))
        assert jax_attn.ffi.register() == ("cpu",)
        np.testing.assert_array_equal(program.call(*map(jnp.asarray, args)), expected)
        print("same")
        """
    )
    assert done == "same\n"


# ---- The guard against handlers that the running jaxlib does not know


@pytest.fixture
def fresh_registration():
    """Forgets what was registered and compiled, before and after."""
    registration.native_module.cache_clear()
    jax.clear_caches()
    yield
    registration.native_module.cache_clear()
    jax.clear_caches()


def built_version():
    import jax_attn._native._cpu as module

    return module.ffi_api_version


@needs_native
def test_built_for_an_older_ffi_than_the_running_one():
    major, minor = registration.runtime_ffi_api_version()
    assert built_version()[0] == major
    assert built_version()[1] <= minor


@needs_native
@pytest.mark.parametrize("change", [(0, -1), (1, 0), (-1, 5)], ids=["minor", "new", "old"])
def test_too_new_handlers_are_not_registered(fresh_registration, monkeypatch, change):
    major, minor = built_version()
    running = (major + change[0], minor + change[1])
    monkeypatch.setattr(registration, "runtime_ffi_api_version", lambda: running)
    registered = []
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *a, **_: registered.append(a))
    message = (
        f"jax_attn: the cpu kernels were built for XLA FFI {major}.{minor}, but this jaxlib has "
        f"{running[0]}.{running[1]}; using jax.numpy instead. Reinstall jax_attn, or update jaxlib."
    )
    with pytest.warns(RuntimeWarning, match=f"^{re.escape(message)}$"):
        assert jax_attn.platforms() == ()
    assert registered == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        check_without_kernels()


@needs_native
def test_a_newer_runtime_is_fine(fresh_registration, monkeypatch):
    major, minor = built_version()
    monkeypatch.setattr(registration, "runtime_ffi_api_version", lambda: (major, minor + 9))
    assert "cpu" in jax_attn.platforms()


def check_without_kernels():
    """Asserts that everything works, by other means, where there are no kernels."""
    assert jax_attn.ffi.register() == ()
    assert jax_attn.ffi.capabilities() == []
    assert jax_attn.ffi.export_checks() == []
    with pytest.raises(ValueError, match=r"no handlers for 'cpu'; this installation has them"):
        jax_attn.ffi.variants("cpu")
    query, key, lengths = inputs()
    out = attend(query, key, lengths)
    scores = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(8)
    scores = np.where(np.arange(40) < np.asarray(lengths)[:, None, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(out, np.einsum("bnts,bsnh->btnh", weights, key), atol=1e-6)
    assert TARGET not in jax.jit(attend).lower(query, key, lengths).as_text()
    cache = jax_attn.PagedKVCache(key.reshape(8, 10, 2, 8), key.reshape(8, 10, 2, 8))
    table = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    paged = jax_attn.paged_attention(query, cache, table, lengths)
    np.testing.assert_allclose(paged, out, atol=1e-6)
    grads = jax.grad(lambda q: attend(q, key, lengths).sum())(query)
    assert np.isfinite(grads).all()
    (call,) = jax_attn.explain(attend)(query, key, lengths)
    assert call.implementation == "xla"
    assert call.refused == {
        "native": "the CPU kernels are not installed, or too new for this jaxlib"
    }
    message = r'implementation="native" cannot be used on cpu: the CPU kernels are not installed'
    with pytest.raises(NotImplementedError, match=message):
        jax_attn.split_kv_attention(query, key, key, implementation="native")


# ---- Without the native module


def run(script):
    """Runs an indented script in a new process; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_works_without_the_native_module():
    folders = [path for path in sys.path if path.endswith(("tests", "examples"))]
    done = run(
        f"""
        import sys
        sys.path[:0] = {folders!r}
        sys.modules["jax_attn._native._cpu"] = None  # cannot be imported
        import ffi_test

        ffi_test.check_without_kernels()
        print("works")
        """
    )
    assert done == "works\n"


def test_a_broken_native_module_is_an_error(monkeypatch):
    # Its own dependency is missing: silence would hide a broken installation.
    def import_module(name):
        raise ModuleNotFoundError("No module named 'libfoo'", name="libfoo")

    monkeypatch.setattr(registration.importlib, "import_module", import_module)
    with pytest.raises(ModuleNotFoundError, match="libfoo"):
        registration.native_module.__wrapped__("cpu")


def test_import_starts_no_backend_and_loads_no_native_module():
    done = run(
        """
        import sys
        import jax_attn
        from jax._src import xla_bridge

        print(xla_bridge.backends_are_initialized(), "jax_attn._native._cpu" in sys.modules)
        """
    )
    assert done == "False False\n"
