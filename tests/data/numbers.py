import torch


class Numbers:
    """A data set of `count` small images, each other than all others and than its mirror image."""

    flips = True

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, item):
        image = torch.tensor([10 * item, item, 0])[:, None, None] + torch.arange(4)
        return image.expand(3, 4, 4).to(torch.uint8)
