"""Are samples copies of training images? The nearest training images of each, in the distance after the mollifier."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import Subset

from data.loader import all_batches


class Nearest(NamedTuple):
    """The k nearest images of a data set for each of N images, nearest first.

    distance   mean squared difference after the mollifier, float32 [N, k]
    item       index in the data set, int64 [N, k]
    mirrored   whether the mirror image of the item is what is near, bool [N, k]
    """

    distance: torch.Tensor
    item: torch.Tensor
    mirrored: torch.Tensor


def nearest_images(images, dataset, mollifier, k=3, limit=None, batch_size=256, num_workers=0, device="cpu"):
    """Nearest of images float [N, C, H, W] in [−1, 1] among those of a data set and their mirror images.

    Training shows both, and both count as one: an item is at most once among the k. Images of another size than the
    data set's are resized to it first.
    limit    compare with so many items only, evenly spread over the data set; None: with all
    """
    count = len(dataset) if limit is None else min(limit, len(dataset))
    items = torch.arange(count) * len(dataset) // count
    size = dataset.size
    if images.shape[-2:] != size:
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    images = mollifier.blur(images.to(device))
    images = torch.cat([images, images.flip(-1)]).flatten(1)  # |x − mirror(y)| = |mirror(x) − y|, and T has no side
    n = len(images) // 2
    best = Nearest(torch.empty(n, 0), torch.empty(n, 0, dtype=torch.int64), torch.empty(n, 0, dtype=torch.bool))
    for batch, index in all_batches(Subset(dataset, items.tolist()), batch_size, device, num_workers):
        distance = torch.cdist(images, mollifier.blur(batch).flatten(1)).square() / images.shape[1]
        distance, side = distance.unflatten(0, (2, n)).min(dim=0)
        new = Nearest(distance.cpu(), items[index].expand(n, -1), side.bool().cpu())
        both = [torch.cat(pair, dim=1) for pair in zip(best, new, strict=True)]
        order = both[0].argsort(dim=1, stable=True)[:, :k]
        best = Nearest(*(part.gather(1, order) for part in both))
    return best
