# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""RoPE tables against closed forms and transformers, and what rotating by them means."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import qkv_cases

from jax_attn._src.fused_qkv_rope_cache.api import fused_qkv_rope_cache
from jax_attn._src.kv_cache import PagedKVCache
from jax_attn._src.rope import Rope


@qkv_cases.jit
def turn(x, positions, rope):
    """Rotates `[tokens, head_dim]` as the queries of the op."""
    cache = PagedKVCache.zeros(0, 1, 1, x.shape[1], dtype=x.dtype)
    qkv = jnp.tile(x, (1, 3))
    slots = jnp.full(len(x), -1, jnp.int32)
    result = fused_qkv_rope_cache(qkv, cache, slots, num_q_heads=1, positions=positions, rope=rope)
    return result.query[:, 0]


def frequencies(rope):
    """Recovers frequencies (below pi) and the attention factor from the tables."""
    angle = np.arctan2(np.float64(rope.sin[1]), np.float64(rope.cos[1]))
    return angle, float(np.mean(np.hypot(np.float64(rope.cos[1]), np.float64(rope.sin[1]))))


def test_default_tables():
    rope = Rope.default(4, 1000)
    assert rope.cos.shape == (1000, 2) and rope.rotary_dim == 4
    for position in (0, 1, 7, 999):
        angles = [position, position * 0.01]
        np.testing.assert_allclose(rope.cos[position], np.cos(angles), rtol=0, atol=6e-8)
        np.testing.assert_allclose(rope.sin[position], np.sin(angles), rtol=0, atol=6e-8)


def test_linear_tables_are_slower():
    slow, fast = Rope.linear(32, 65, factor=8.0, theta=5e3), Rope.default(32, 9, theta=5e3)
    np.testing.assert_allclose(slow.cos[::8], fast.cos, atol=1e-7)
    np.testing.assert_allclose(slow.sin[::8], fast.sin, atol=1e-7)


def test_llama3_tables():
    rope = Rope.llama3(128, 2)  # the defaults are those of Llama 3.1
    expected = []
    for i in range(64):
        frequency = 500000.0 ** (-i / 64)
        wavelength = 2 * math.pi / frequency
        if wavelength > 8192:
            frequency /= 8
        elif wavelength > 8192 / 4:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / 8 + smooth * frequency
        expected.append(frequency)
    got, attention_factor = frequencies(rope)
    np.testing.assert_allclose(got, expected, rtol=3e-7)
    assert abs(attention_factor - 1) < 1e-6
    # 500000 ** (-63 / 64) / 8.
    np.testing.assert_allclose(got[[0, -1]], [1.0, 3.068926e-07], rtol=1e-6)


def test_yarn_tables():
    rope = Rope.yarn(128, 2, factor=4.0, original_max_positions=32768, theta=1e6)
    got, attention_factor = frequencies(rope)
    plain = 1e6 ** (-np.arange(64) / 64)
    # Pair i turns 32768 * plain[i] / (2 pi) times: 32 times at i = 23.6, once at 39.7.
    np.testing.assert_allclose(got[:24], plain[:24], rtol=3e-7)
    np.testing.assert_allclose(got[40:], plain[40:] / 4, rtol=3e-7)
    slow = (32 - 23) / (40 - 23)
    np.testing.assert_allclose(got[32], plain[32] * (1 - slow + slow / 4), rtol=3e-7)
    np.testing.assert_allclose(attention_factor, 0.1 * math.log(4) + 1, rtol=1e-6)


CONFIGS = [
    ("default", {}, {}),
    ("linear", {"factor": 4.0}, {}),
    (
        "llama3",
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"original_max_position_embeddings": 8192},
    ),
    (
        "llama3",
        {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"original_max_position_embeddings": 8192},
    ),
    ("yarn", {"factor": 4.0}, {"original_max_position_embeddings": 32768}),
    (
        "yarn",
        {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 16.0},
        {"original_max_position_embeddings": 4096},
    ),
    (
        "yarn",
        {"factor": 32.0, "truncate": False, "beta_slow": 2.0},
        {"original_max_position_embeddings": 4096},
    ),
    (
        "yarn",
        {"factor": 16.0, "attention_factor": 0.5},
        {"original_max_position_embeddings": 2048},
    ),
]


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("rope_type, scaling, context", CONFIGS)
def test_frequencies_agree_with_transformers(rope_type, scaling, context, theta):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    parameters = {"rope_type": rope_type, "rope_theta": theta, **scaling, **context}
    config = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )
    if rope_type == "default":  # not in the table
        llama = pytest.importorskip("transformers.models.llama.modeling_llama")
        compute = llama.LlamaRotaryEmbedding.compute_default_rope_parameters
    else:
        compute = rope_utils.ROPE_INIT_FUNCTIONS[rope_type]
    expected, expected_factor = compute(config)
    if context:
        scaling = {**scaling, "original_max_positions": context["original_max_position_embeddings"]}
    rope = getattr(Rope, rope_type)(128, 2, theta=theta, **scaling)
    got, attention_factor = frequencies(rope)
    # transformers computes in float32, a few ulp of which are those of its powers.
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)
    np.testing.assert_allclose(attention_factor, expected_factor, rtol=1e-6)


def rotate_half(x):
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([-second, first], axis=-1)


@pytest.mark.parametrize("interleaved", [False, True], ids=["qwen2-vl", "qwen3-vl"])
def test_mrope_agrees_with_transformers(interleaved):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sections = (24, 20, 20) if interleaved else (16, 24, 24)
    parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}
    sizes = {"hidden_size": 256, "num_attention_heads": 2, "rope_parameters": parameters}
    if interleaved:
        qwen = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
        config = transformers.Qwen3VLTextConfig(**sizes, head_dim=128)
        embedding = qwen.Qwen3VLTextRotaryEmbedding(config)
    else:
        qwen = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
        config = transformers.Qwen2VLTextConfig(**sizes)
        embedding = qwen.Qwen2VLRotaryEmbedding(config)
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 50, (3, 7), np.int32)
    x = rng.normal(size=(7, 128)).astype(np.float32)
    cos, sin = embedding(torch.zeros(1), torch.from_numpy(positions.astype(np.int64))[:, None])
    expected = x * cos[0].numpy() + rotate_half(x) * sin[0].numpy()
    rope = Rope.default(128, 50, theta=1e6, mrope_sections=sections, mrope_interleaved=interleaved)
    np.testing.assert_allclose(turn(x, positions, rope), expected, atol=2e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_text_positions_make_mrope_plain(interleaved):
    x = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    positions = jnp.arange(5, dtype=jnp.int32)
    plain = turn(x, positions, Rope.default(16, 5))
    rope = Rope.default(16, 5, mrope_sections=(4, 2, 2), mrope_interleaved=interleaved)
    np.testing.assert_array_equal(turn(x, jnp.stack([positions] * 3), rope), plain)


def test_pairs_turn_as_complex_numbers():
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(6, 8)).astype(np.float32), np.int32([0, 1, 5, 2, 99, 50])
    turned = np.exp(1j * positions[:, None] * 10000.0 ** (-np.arange(4) / 4))
    neighbours = (x[:, 0::2] + 1j * x[:, 1::2]) * turned
    got = turn(x, positions, Rope.default(8, 100, interleaved=True))
    np.testing.assert_allclose(got[:, 0::2], neighbours.real, atol=1e-6)
    np.testing.assert_allclose(got[:, 1::2], neighbours.imag, atol=1e-6)
    halves = (x[:, :4] + 1j * x[:, 4:]) * turned
    got = turn(x, positions, Rope.default(8, 100))
    np.testing.assert_allclose(got, np.hstack([halves.real, halves.imag]), atol=1e-6)


@pytest.mark.parametrize("nope_first", [False, True])
def test_partial_rotation_passes_the_rest(nope_first):
    x = np.random.default_rng(0).normal(size=(4, 24)).astype(np.float32)
    positions = jnp.arange(4, dtype=jnp.int32)
    got = turn(x, positions, Rope.default(8, 4, nope_first=nope_first))
    span, rest = (slice(16, None), slice(16)) if nope_first else (slice(8), slice(8, None))
    np.testing.assert_array_equal(got[:, rest], x[:, rest])
    whole = turn(x[:, span], positions, Rope.default(8, 4))
    np.testing.assert_array_equal(got[:, span], whole)


@pytest.mark.parametrize("interleaved", [False, True])
def test_full_width_tables_that_repeat_are_half_width_ones(interleaved):
    x = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    positions = jnp.arange(4, dtype=jnp.int32)
    half = Rope.default(16, 4, interleaved=interleaved)
    widen = (lambda a: jnp.repeat(a, 2, 1)) if interleaved else (lambda a: jnp.tile(a, (1, 2)))
    full = Rope(widen(half.cos), widen(half.sin), interleaved=interleaved, table_width="full")
    np.testing.assert_array_equal(turn(x, positions, full), turn(x, positions, half))


def test_packed_tables():
    x = np.random.default_rng(0).normal(size=(4, 24)).astype(np.float32)
    positions = jnp.arange(4, dtype=jnp.int32)
    rope = Rope.default(16, 4, interleaved=True)
    packed = Rope.packed(jnp.concatenate([rope.cos, rope.sin], axis=1), interleaved=True)
    assert packed.rotary_dim == 16 and packed.table_width == "half"
    np.testing.assert_array_equal(turn(x, positions, packed), turn(x, positions, rope))


def test_scores_depend_on_the_distance():
    x = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    rope = Rope.default(64, 200)
    near, far = (turn(x, jnp.array([p, p + 9], jnp.int32), rope) for p in (0, 150))
    np.testing.assert_allclose(near[0] @ near[1], far[0] @ far[1], rtol=1e-4)


def test_bfloat16_tables():
    rope = Rope.default(8, 10, dtype=jnp.bfloat16)
    assert rope.cos.dtype == rope.sin.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rope.cos, Rope.default(8, 10).cos.astype(jnp.bfloat16))


def test_frequencies_of_zero_turn_nothing():
    x = np.ones((2, 4), np.float32)
    rope = Rope.from_frequencies([0.5, 0.0], 3, attention_factor=2.0)
    got = turn(x, jnp.array([1, 2], jnp.int32), rope)
    np.testing.assert_array_equal(got[:, [1, 3]], np.full((2, 2), 2))


def test_errors():
    with pytest.raises(ValueError, match=r"Rope.packed: `table` must have shape .* \(4, 3\)"):
        Rope.packed(jnp.ones((4, 3)))
    with pytest.raises(ValueError, match=r"Rope.packed: `table` must have shape .* \(4,\)"):
        Rope.packed(jnp.ones(4))
    for build in (Rope.default, Rope.llama3):
        with pytest.raises(ValueError, match=r"Rope.* rotary_dim must be positive and even, got 7"):
            build(7, 10)
