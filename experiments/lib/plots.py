"""Plots, tables of results as JSON, CSV, Markdown and a plot, grids of labelled columns, and animations."""

import csv
import io

import matplotlib
import matplotlib.pyplot as plt
import torch
from PIL import Image, ImageDraw

from utils.files import replacing, write_json
from utils.images import tile, to_pil

matplotlib.use("Agg")  # needs no display

MIN_WIDTH = 96  # pixels of an image in a grid, so that a label fits above it
LABEL_HEIGHT = 16  # pixels


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


def cost_plot(rows, images):
    """A figure with the cost of a training step by the share of pixels that it sees, and images beside it.

    rows     those of the suite training of experiments/benchmark.py
    images   {title: uint8 [C, H, W]}
    """
    figure, axes = plt.subplots(1, 1 + len(images), figsize=(9.6, 3.2), layout="constrained")
    rows = [row for row in rows if row["path"] == "fast"]
    for label, field in (("time", "ms"), ("memory", "peak MB")):
        axes[0].plot([row[field] / rows[0][field] for row in rows], "o-", label=label)
    axes[0].set_xticks(range(len(rows)), [row["rate"] for row in rows])
    axes[0].set(title="cost of a training step", xlabel="share of pixels", ylabel="relative to all", ylim=(0, 1.05))
    axes[0].grid(alpha=0.3)
    axes[0].legend()
    for panel, (title, image) in zip(axes[1:], images.items(), strict=True):
        panel.imshow(to_pil(image), interpolation="nearest", cmap="gray", vmin=0, vmax=255)
        panel.set(title=title, xticks=[], yticks=[])
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


def save_grid(columns, path):
    """Write a PNG with a column of images below each label.

    columns   {label: list of uint8 [C, H, W]}; every image is resized, without interpolation, to the largest size, or
              to a multiple of it that is at least MIN_WIDTH wide
    """
    columns = {label: [to_pil(image) for image in images] for label, images in columns.items()}
    width, height = map(max, zip(*(image.size for images in columns.values() for image in images), strict=True))
    factor = -(-MIN_WIDTH // width)
    cell = (width * factor, height * factor)
    rows = max(map(len, columns.values()))
    grid = Image.new("RGB", (cell[0] * len(columns), LABEL_HEIGHT + cell[1] * rows), "white")
    draw = ImageDraw.Draw(grid)
    for column, (label, images) in enumerate(columns.items()):
        draw.text((column * cell[0] + 3, 2), label, fill="black")
        for row, image in enumerate(images):
            place = (column * cell[0], LABEL_HEIGHT + row * cell[1])
            grid.paste(image.resize(cell, Image.Resampling.NEAREST), place)
    with replacing(path) as temporary:
        grid.save(temporary, format="PNG")


def save_gif(frames, path, columns):
    """Write an animation, as of `gif`.

    frames   list of lists of uint8 images [C, H, W]; those of a frame are tiled in so many columns, and enlarged to at
             least MIN_WIDTH
    """
    factor = -(-MIN_WIDTH // frames[0][0].shape[2])
    tiled = [to_pil(tile(torch.stack(images), columns)) for images in frames]
    with replacing(path) as temporary:
        temporary.write_bytes(gif([frame.resize((frame.width * factor, frame.height * factor), Image.Resampling.NEAREST)
                                   for frame in tiled]))


def gif(frames):
    """Bytes of an animation of Pillow images that runs forward and backward in a loop."""
    buffer = io.BytesIO()
    frames[0].save(buffer, format="GIF", save_all=True, append_images=[*frames[1:], *frames[-2:0:-1]], duration=120,
                   loop=0)
    return buffer.getvalue()
