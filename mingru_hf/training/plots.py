"""Plots of the loss curve of a run and of a confusion matrix."""

from pathlib import Path

from .checkpoints import write_whole

try:
    from matplotlib.figure import Figure
except ImportError:
    raise ImportError("training draws loss curves with matplotlib: pip install matplotlib") from None


def plot_loss(history: list[dict], path: str | Path, unit: str = "nats per token") -> None:
    """Plot training and validation loss over the optimizer steps and save the plot as PNG.

    Args:
        history: the records of `train`: those with `loss` are drawn as a thin line, those with `eval_loss` as a line
            with dots.
        path: the file to write.
        unit: the loss's unit, for the axis.
    """
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    training = [(record["step"], record["loss"]) for record in history if "loss" in record]
    validation = [(record["step"], record["eval_loss"]) for record in history if "eval_loss" in record]
    if training:
        axes.plot(*zip(*training, strict=True), linewidth=1, color="tab:gray", label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), marker="o", markersize=4, color="tab:blue", label="validation")
        step, best = min(validation, key=lambda point: point[1])
        axes.annotate(f"{best:.4f}", (step, best), xytext=(0, 8), textcoords="offset points", ha="center")
    if training or validation:
        axes.legend()
    axes.set(xlabel="optimizer steps", ylabel=f"loss ({unit})")
    axes.grid(alpha=0.3)
    write_whole(path, figure.savefig)


def plot_confusion(matrix, names: list[str], path: str | Path) -> None:
    """Plot a confusion matrix, each row as fractions of its class, and save the plot as PNG.

    Args:
        matrix: (classes, classes) counts, one row per true class.
        names: names of the classes.
        path: the file to write.
    """
    matrix = matrix.numpy()
    shares = matrix / matrix.sum(1, keepdims=True).clip(min=1)
    few = len(names) <= 20
    side = 1.5 + 0.7 * len(names) if few else 3 + 0.13 * len(names)
    figure = Figure(figsize=(side, side), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    fontsize = None if few else 4
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=fontsize)
    axes.set_yticks(range(len(names)), names, fontsize=fontsize)
    axes.set(xlabel="predicted class", ylabel="class")
    if few:
        for row, column in zip(*matrix.nonzero(), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, matrix[row, column], ha="center", va="center", color=color)
    write_whole(path, figure.savefig)
