"""Plots of numbers, as files that pages and documents can hold."""

import io

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)


def line_plot(series, title, xlabel, ylabel, log=False):
    """A figure of curves; series is {label: [(x, y), …]}, those without points are left out."""
    figure, axes = plt.subplots(figsize=(5.4, 3.2), layout="constrained")
    for label, points in series.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.4)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        axes.legend()
    return figure


def to_bytes(figure, kind):
    """The figure as a file of kind svg or png; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    plt.close(figure)
    return buffer.getvalue()
