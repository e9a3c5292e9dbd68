# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The example that trains a byte-patch model."""

import re

import numpy as np
import pytest

import jax_attn

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")

import train_cross_attention as example


def test_patches_are_the_text():
    rng = np.random.default_rng(0)
    text = rng.choice(np.frombuffer(b"ab \n", np.uint8), 2000, p=[0.8, 0.1, 0.05, 0.05])
    patches, lengths = example.cut_into_patches(text)
    joined = np.concatenate([p[:n] for p, n in zip(patches, lengths, strict=True)])
    np.testing.assert_array_equal(joined, text[: len(joined)])
    assert len(text) - len(joined) < 100
    assert set(np.unique(lengths)) <= set(range(2, 17)) and len(set(lengths)) > 8


def test_training_lowers_the_loss_and_kernels_agree_with_xla(capsys, monkeypatch):
    monkeypatch.setattr(example, "COMPARED_STEPS", 3)
    monkeypatch.setattr(example, "STREAMS", 2)
    losses = example.main(["--seconds", "2"])
    printed = capsys.readouterr().out
    assert np.isfinite(losses).all()
    assert min(losses[-3:]) < losses[0] - 0.2
    assert f"nats per byte over {len(losses)} steps" in printed
    if "cpu" in jax_attn.platforms():
        (difference,) = re.findall(r"largest difference of a loss: (\S+)", printed)
        assert float(difference) < 1e-4
