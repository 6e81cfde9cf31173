"""A table of results on disk, in the three forms that programs, spreadsheets and documents read, and as dots."""

import csv
import json

from utils.files import replacing
from utils.plots import dot_plot, to_bytes


def write_results(folder, rows, columns, panels):
    """results.json, .csv, .md and .png in `folder`.

    rows      dicts, all with the same keys; JSON and CSV hold them as they are
    columns   {heading: row -> text} of the Markdown table
    panels    {title: row -> (value, error) or None} of the plot, which has a line per row, called by two columns
    """
    for suffix, content in (("json", json.dumps(rows, indent=2) + "\n"), ("md", markdown(rows, columns))):
        with replacing(folder / f"results.{suffix}") as temporary:
            temporary.write_text(content)
    with replacing(folder / "results.csv") as temporary, open(temporary, "w", newline="") as file:
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
