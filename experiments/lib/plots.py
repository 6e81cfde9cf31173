"""Plots, and tables of results as JSON, CSV, Markdown and a plot."""

import csv
import io

import matplotlib
import matplotlib.pyplot as plt

from utils.files import replacing, write_json

matplotlib.use("Agg")  # needs no display


def line_plot(series, title, xlabel, ylabel, log=False):
    """A figure of curves {label: [(x, y), …]}; curves without points are left out."""
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
    """Bytes of the figure as a file of kind svg or png. Closes the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    plt.close(figure)
    return buffer.getvalue()


def dot_plot(names, panels):
    """A figure with a row for each of N names (group, name), coloured by group, and a column of dots for each panel
    {title: N of (value, error) or None}."""
    groups = list(dict.fromkeys(group for group, _ in names))
    height = 0.6 + 0.23 * len(names)
    figure, axes = plt.subplots(1, len(panels), figsize=(3 + 2.2 * len(panels), height), sharey=True, squeeze=False,
                                layout="constrained")
    for panel, (title, points) in zip(axes[0], panels.items(), strict=True):
        for place, ((group, _), point) in enumerate(zip(names, points, strict=True)):
            if point is not None:
                value, error = point
                panel.errorbar(value, place, xerr=error or None, fmt="o", markersize=4.5, capsize=2,
                               color=f"C{groups.index(group) % 10}")
        panel.set_title(title, fontsize=9)
        panel.tick_params(axis="x", labelsize=8)
        panel.grid(axis="both", alpha=0.3)
    axes[0][0].set_yticks(range(len(names)), [f"{group}: {name}" for group, name in names], fontsize=8)
    axes[0][0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def write_results(folder, rows, columns, panels):
    """Write results.json, .csv, .md and .png to `folder`.

    rows      dicts, all with the same keys; JSON and CSV hold them as they are
    columns   {heading: row -> text} of the Markdown table; the first two name the rows of the plot
    panels    {title: row -> (value, error) or None} of the plot
    """
    write_json(folder / "results.json", rows)
    with replacing(folder / "results.md") as temporary:
        temporary.write_text(markdown(rows, columns), encoding="utf-8")
    with replacing(folder / "results.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    first, second = list(columns.values())[:2]
    values = {title: [panel(row) for row in rows] for title, panel in panels.items()}
    figure = dot_plot([(first(row), second(row)) for row in rows], values)
    with replacing(folder / "results.png") as temporary:
        temporary.write_bytes(to_bytes(figure, "png"))


def markdown(rows, columns):
    """The rows as a Markdown table."""
    lines = [list(columns), ["---"] * len(columns), *([text(row) for text in columns.values()] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
