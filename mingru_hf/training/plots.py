"""The loss curve of a run as a picture."""

from pathlib import Path

from matplotlib.figure import Figure


def plot_loss(history: list[dict], path: str | Path, unit: str = "nats a token") -> None:
    """Draw training and validation loss over the optimizer steps and save it as PNG.

    Args:
        history: records of `train`: those with `loss` make the thin line, those with `eval_loss` the dots.
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
    figure.savefig(path)
