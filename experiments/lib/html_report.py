"""Pieces of a self-contained HTML page: images are embedded, and tables scroll on narrow screens."""

import base64
import html
import io

import torch
from PIL import Image

from utils.images import tile, to_pil

MAX_GRID_PIXELS = 2**18  # of a grid, approximately: fewer of larger images are shown
MAX_SIDE = 2048  # pixels


def embed(content, alt, attributes="", kind="png"):
    """An <img> that holds an image: a Pillow image, uint8 [C, H, W], or the bytes of a file of this kind."""
    if isinstance(content, torch.Tensor):
        content = to_pil(content)
    if isinstance(content, Image.Image):
        buffer = io.BytesIO()
        content.save(buffer, format=kind)
        content = buffer.getvalue()
    data = base64.b64encode(content).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{html.escape(alt)}" {attributes}>'


def most_images(height, width, count=64):
    """How many images of H×W a grid shows: at most `count`, and as many as MAX_GRID_PIXELS allows, but at least 4."""
    return max(4, min(count, MAX_GRID_PIXELS // (height * width)))


def grid(images, caption, columns=None, scale=None):
    """A <figure> of uint8 images [N, C, H, W] in a grid, at most `most_images`.

    scale    width of a pixel; default: 2 for images up to 128 pixels wide, else 1
    """
    images = images[:most_images(*images.shape[-2:])]
    scale = scale or (2 if images.shape[-1] <= 128 else 1)
    tiled = to_pil(tile(images, columns or max(1, round(len(images) ** 0.5))))
    return figure(embed(tiled, caption, f'width="{tiled.width * scale}" height="{tiled.height * scale}"'), caption)


def picture(path, caption):
    """A <figure> of an image file, reduced to at most MAX_SIDE pixels per side."""
    with Image.open(path) as image:
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        return figure(embed(image, caption), caption)


def figure(content, caption, kind=""):
    """Any content with a caption; kind is a class of the page's style."""
    return (f"<figure{f' class={kind}' if kind else ''}>{content}<figcaption>{html.escape(caption)}</figcaption>"
            "</figure>")


def row(*figures):
    """Figures side by side, if there is room."""
    return f'<div class="row">{"".join(figures)}</div>' if any(figures) else ""


def paragraph(text, note=False):
    """Text, or a note in grey."""
    return f'<p{" class=note" if note else ""}>{html.escape(text)}</p>'


def table(rows, wrap=False):
    """Rows of cells as a table; the first row is the heading. wrap: break the lines of long cells."""
    lines = ["".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
             for tag, cells in zip(["th"] + ["td"] * (len(rows) - 1), rows, strict=True)]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table{" class=wrap" if wrap else ""}>{body}</table></div>'


def section(title, *parts):
    """A heading and the parts below it; "" if all parts are empty."""
    body = "".join(parts)
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>\n" if body else ""
