# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""What the README shows works as it stands."""

import pathlib
import re

import support

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["out"].shape == (2, 1, 32, 128)
    expected = "native" if support.VARIANTS else "xla"
    assert f"paged_attention on cpu: {expected}" in capsys.readouterr().out


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / link).exists(), link


def test_its_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", README, re.MULTILINE)) <= targets
