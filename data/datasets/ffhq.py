"""FFHQ: 70,000 PNG files, flat or in folders of a thousand (00000/00000.png); the last 5 % are held out."""

from data.datasets.folder import Folder


class FFHQ(Folder):
    """Faces below `root`. Only PNG files count, so that pictures of another kind beside them do no harm."""

    name = "ffhq"
    suffixes = (".png",)
    example = "00000/00000.png"
