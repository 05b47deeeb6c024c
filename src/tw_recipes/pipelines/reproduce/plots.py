"""The plots of a report, each as PNG and SVG.

Tests: tests/recipes/pipelines/test_reproduce.py (they are there and hold something).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLORS = {"sequential": "#7a8594", "forkjoin": "#2f6fb3"}
LABELS = {"sequential": "sequential", "forkjoin": "fork/join"}


def accuracy_latency(path: Path, results: Mapping[str, Any]) -> Path:
    """Accuracy over tokens on the critical path, a point a stage, with Wilson intervals."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, label in LABELS.items():
        stages = results["sides"][name]["stages"]
        x, y = [s["token_latency"] for s in stages], [100 * s["accuracy"] for s in stages]
        low = [max(0.0, 100 * (s["accuracy"] - s["accuracy_low"])) for s in stages]
        high = [max(0.0, 100 * (s["accuracy_high"] - s["accuracy"])) for s in stages]
        axes.errorbar(x, y, yerr=[low, high], marker="o", capsize=3, color=COLORS[name], label=label, alpha=0.8)
        for place, (stage, across, up) in enumerate(zip(stages, x, y, strict=True)):
            # Stages at one point write below one another; right of fork/join's points, left of sequential ones.
            left = name == "sequential"
            axes.annotate(
                f"{place + 1} {stage['name']}",
                (across, up),
                textcoords="offset points",
                xytext=(-8 if left else 8, -10 * place - 4),
                ha="right" if left else "left",
                color=COLORS[name],
                fontsize=7,
            )
    axes.set(xlabel="tokens on the critical path", ylabel="accuracy, %", title="Accuracy and token latency by stage")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    return _save(figure, path)


def training(path: Path, sides: Mapping[str, Any]) -> Path:
    """Loss and token accuracy of supervised training and self-training, steps counted through."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in LABELS.items():
        done, steps, losses, accuracies = 0, [], [], []
        for stage in sides[name].supervised:
            for step, loss, accuracy in stage.figures["curve"]:
                steps.append(done + step)
                losses.append(loss)
                accuracies.append(accuracy)
            done += stage.figures["steps"]
        left.plot(steps, losses, marker=".", color=COLORS[name], label=label)
        right.plot(steps, accuracies, marker=".", color=COLORS[name], label=label)
    left.set(xlabel="step after the common start", ylabel="loss", yscale="log")
    right.set(xlabel="step after the common start", ylabel="token accuracy")
    left.legend(fontsize=8, frameon=False)
    return _save(figure, path)


def reinforcement(path: Path, sides: Mapping[str, Any]) -> Path:
    """Accuracy, critical path and activation ratio of the rollouts of each step."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    names = ("accuracy", "token_latency", "activation_ratio")
    for axes, name in zip(figure.subplots(1, 3), names, strict=True):
        for side, label in LABELS.items():
            values = [value for stage in sides[side].reinforced for value in stage.figures["curve"][name]]
            axes.plot(range(1, len(values) + 1), values, marker=".", color=COLORS[side], label=label)
        axes.set(xlabel="step of reinforcement learning", title=name.replace("_", " "))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8, frameon=False)
    return _save(figure, path)


def speedup(path: Path, values: Sequence[float], mean: float) -> Path:
    """Histogram of sequential tokens / critical path, problem by problem."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.hist(values, bins=min(30, max(5, len(values) // 5)), color=COLORS["forkjoin"], edgecolor="white")
    axes.axvline(mean, color="#c4572b", label=f"mean {mean:.2f}x")
    axes.axvline(1.0, color="gray", linestyle=":", label="no speedup")
    axes.set(xlabel="sequential tokens / critical path", ylabel="problems", title="Speedup per problem")
    axes.legend(fontsize=8, frameon=False)
    return _save(figure, path)


def wall_clock(path: Path, results: Mapping[str, Any]) -> Path:
    """Seconds a problem by problems in flight."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for place, (name, label) in enumerate(LABELS.items()):
        seconds = results["sides"][name]["seconds_per_problem"]
        across = [i + 0.4 * place for i in range(len(seconds))]
        axes.bar(across, list(seconds.values()), width=0.38, color=COLORS[name], label=label)
        axes.set_xticks([i + 0.2 for i in range(len(seconds))], list(seconds))
    axes.set(xlabel="problems in flight", ylabel="seconds a problem", title="Wall clock")
    axes.legend(fontsize=8, frameon=False)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=130)
    return path
