# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Draws a benchmark's results: the fraction of the read ceiling, by case and implementation."""

from typing import Any


def draw(header: dict[str, Any], results: list[dict[str, Any]], path: str) -> None:
    """Writes one grouped horizontal bar chart; the suffix of `path` names the format."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [r for r in results if r["status"] == "timed"]
    cases = list(dict.fromkeys(r["case"] for r in timed))
    titles = list(dict.fromkeys(r["title"] for r in timed))
    colors = {title: plt.get_cmap("tab10")(i % 10) for i, title in enumerate(titles)}

    bar = 0.2  # inches
    rows: list[tuple[float, dict[str, Any]]] = []
    centers, y = [], 0.0
    for case in cases:
        group = [r for r in timed if r["case"] == case]
        rows += [(y + i, r) for i, r in enumerate(group)]
        centers.append(y + (len(group) - 1) / 2)
        y += len(group) + 1
    figure, axes = plt.subplots(figsize=(9, max(2.5, bar * y + 1.6)), layout="constrained")
    for title in titles:
        own = [(at, r["fraction_of_ceiling"]) for at, r in rows if r["title"] == title]
        axes.barh(*zip(*own, strict=True), height=0.9, color=colors[title], label=title)
    for at, r in rows:
        label = f"{r['fraction_of_ceiling']:.0%}  {_duration(r['median_ms'])}"
        axes.text(r["fraction_of_ceiling"] + 0.005, at, label, va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(centers, cases, fontsize=8)
    axes.set_ylim(y - 0.5, -1)
    axes.set_xlim(0, max([1.15, *(r["fraction_of_ceiling"] + 0.15 for _, r in rows)]))
    axes.set_xlabel("fraction of the read bandwidth measured in the same run")
    axes.set_title(f"{header['device']}\n{_versions(header)}", fontsize=8)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _duration(milliseconds: float) -> str:
    if milliseconds < 0.1:
        return f"{1000 * milliseconds:.3g} µs"
    return f"{milliseconds:.3g} ms"


def _versions(header: dict[str, Any]) -> str:
    versions = ", ".join(f"{n} {v}" for n, v in header["versions"].items() if v)
    return f"{versions}; {header['commit']}; {header['date']}"
