"""Pieces of a self-contained HTML page: images are embedded, and tables scroll on narrow screens."""

import base64
import html
import io

from PIL import Image

from utils.images import tile, to_pil

MAX_GRID_PIXELS = 2**18  # of a grid, approximately: fewer of larger images are shown
MAX_SIDE = 2048  # pixels


def embed(content, kind, alt, attributes=""):
    """An <img> that holds the bytes of an image file; kind is png or svg+xml."""
    data = base64.b64encode(content).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{html.escape(alt)}" {attributes}>'


def grid(images, caption, columns=None, scale=None):
    """A <figure> of uint8 images [N, C, H, W] in a grid, at most as many as MAX_GRID_PIXELS allows (at least 4).

    scale    width of a pixel; default: 2 for images up to 128 pixels wide, else 1
    """
    height, width = images.shape[-2:]
    images = images[:max(4, min(64, MAX_GRID_PIXELS // (height * width)))]
    scale = scale or (2 if width <= 128 else 1)
    tiled = to_pil(tile(images, columns or max(1, round(len(images) ** 0.5))))
    size = f'width="{tiled.width * scale}" height="{tiled.height * scale}"'
    return figure(embed(_png(tiled), "png", caption, size), caption)


def picture(path, caption):
    """A <figure> of an image file, reduced to at most MAX_SIDE pixels per side."""
    with Image.open(path) as image:
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        return figure(embed(_png(image), "png", caption), caption)


def _png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def figure(content, caption):
    """Any content with a caption."""
    return f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>"


def row(*figures):
    """Figures side by side, if there is room."""
    return f'<div class="row">{"".join(figures)}</div>' if figures else ""


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
