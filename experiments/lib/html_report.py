"""Pieces of a self-contained HTML page: pictures are in it, tables scroll where the screen is narrow."""

import base64
import html
import io

from PIL import Image

from utils.images import tile, to_pil

PIXELS = 2**18  # of a sheet, about: of larger images fewer are shown
LARGEST = 2048  # pixels of a side of a picture


def embed(content, kind, alt, attributes=""):
    """An <img> that holds the bytes of a picture; kind is png or svg+xml."""
    data = base64.b64encode(content).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{html.escape(alt)}" {attributes}>'


def sheet(images, caption, columns=None, scale=None):
    """A <figure> of the first uint8 images [N, C, H, W], as many as there is room for, every pixel `scale` wide.

    scale    default: 2 for images up to 128 pixels wide, and 1
    """
    height, width = images.shape[-2:]
    images = images[:max(4, min(64, PIXELS // (height * width)))]
    scale = scale or (2 if width <= 128 else 1)
    picture = to_pil(tile(images, columns or max(1, round(len(images) ** 0.5))))
    size = f'width="{picture.width * scale}" height="{picture.height * scale}"'
    return figure(embed(_png(picture), "png", caption, size), caption)


def picture(path, caption):
    """A <figure> of an image file, made smaller where it is wider or higher than LARGEST."""
    with Image.open(path) as image:
        image.thumbnail((LARGEST, LARGEST))
        return figure(embed(_png(image), "png", caption), caption)


def _png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def figure(content, caption):
    """Anything with a line below it."""
    return f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>"


def row(*figures):
    """Side by side where there is room."""
    return f'<div class="row">{"".join(figures)}</div>'


def paragraph(text, note=False):
    """Text, or a note in grey."""
    return f'<p{" class=note" if note else ""}>{html.escape(text)}</p>'


def table(rows, wrap=False):
    """Rows of cells as a table; the first row is the heading. wrap: lines of long cells may break."""
    lines = ["".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)
             for tag, row in zip(["th"] + ["td"] * (len(rows) - 1), rows, strict=True)]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table{" class=wrap" if wrap else ""}>{body}</table></div>'


def section(title, *parts):
    """A heading and what is below it; nothing where there are no parts."""
    body = "".join(part for part in parts if part)
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>\n" if body else ""
