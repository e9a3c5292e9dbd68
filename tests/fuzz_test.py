# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Random problems over the whole space of shapes, dtypes and options, against the oracle."""

import numpy as np
import pytest
import support


def pytest_generate_tests(metafunc):
    cases = []
    for each in support.IMPLEMENTATIONS:
        seeds = range(metafunc.config.getoption("fuzz"))
        if each.id == "xla":
            seeds = seeds[::10]  # the reference compiles anew for nearly every problem
        if each.marks:
            seeds = seeds[:1]  # skipped: once is enough to say so
        for seed in seeds:
            cases.append(pytest.param(*each.values, seed, marks=each.marks, id=f"{each.id}-{seed}"))
    metafunc.parametrize("implementation, seed", cases)


@pytest.mark.fuzz
def test_random_problem(implementation, seed):
    problem = random_problem(seed)
    try:
        problem.check(implementation)
    except Exception as error:
        error.add_note(f"seed {seed}: {problem}")
        error.add_note(
            f"Again: python -m pytest 'tests/fuzz_test.py::test_random_problem"
            f"[{implementation}-{seed}]' --fuzz {seed + 1}"
        )
        raise


def random_problem(seed: int) -> support.Problem:
    rng = np.random.default_rng(seed)

    def one_of(*choices):
        return choices[rng.integers(len(choices))]

    def sometimes(*choices):
        return one_of(*choices) if rng.random() < 0.3 else None

    heads, kv_heads = one_of((1, 1), (4, 2), (5, 1), (8, 1), (6, 3), (3, 3), (32, 2))
    head_dim = one_of(8, 64, 64, 72, 80, 128)
    page_size, max_pages = one_of((1, 7), (3, 4), (16, 1), (16, 3), (16, 9), (128, 2))
    is_paged = rng.random() < 0.5
    kv_len = page_size * max_pages if is_paged else one_of(1, 7, 33, 64, 150, 257)
    if rng.random() < 0.02:
        kv_len = max_pages = 0
    batch = 0 if rng.random() < 0.02 else one_of(1, 2, 3)
    query_len = one_of(1, 1, 1, 2, 5, 17)
    lengths = rng.integers(0, kv_len + 1, batch)
    edges = (0, 1, page_size - 1, page_size, page_size + 1, kv_len, query_len - 1)
    for b in range(batch):
        if rng.random() < 0.4:
            lengths[b] = min(one_of(*edges), kv_len)
    dtype = one_of(*support.FLOATS)
    problem = support.dense(
        rng,
        batch=batch,
        query_len=query_len,
        num_q_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=sometimes(8, 64, 96),
        kv_len=kv_len,
        dtype=dtype,
        cache_dtype=one_of(dtype, *support.FLOATS, *support.QUANTIZED),
        lengths=None if rng.random() < 0.2 else lengths,
        bias=sometimes("", "b", "n", "t", "bnt", "nt"),
        mask=sometimes("", "b", "n", "t", "bnt", "bt"),
        alibi=rng.random() < 0.3,
        sinks=rng.random() < 0.3,
        k_scale=sometimes("scalar", "head", "token"),
        v_scale=sometimes("scalar", "head", "token"),
    )
    problem = problem.replace(
        scale=sometimes(0.3, -0.2, 0.0),
        causal=one_of(None, "bottom_right", "top_left"),
        sliding_window=sometimes(1, 5, 16, 1000),
        logits_soft_cap=sometimes(0.5, 30.0),
        lse_includes_sinks=sometimes(False),
        **one_of({}, {}, {"num_splits": one_of(1, 2, 3, 7)}, {"split_size": one_of(1, 5, 16, 64)}),
    )
    problem = support.poison(problem)
    if not is_paged:
        return problem
    layout, layers = one_of("NHD", "HND"), sometimes(1, 3)
    per_layer = layers is not None and rng.random() < 0.5
    return support.paged(
        problem, rng, page_size, layout, layers, spare_pages=one_of(1, 5), scale_per_layer=per_layer
    )
