import torch


class Numbers:
    """A data set of `count` small images; all their orientations differ."""

    flips = True
    conditions = None

    def __init__(self, count, turns=(0,)):
        self.count = count
        self.orientations = [(turn, mirrored) for mirrored in (False, True) for turn in turns]

    def __len__(self):
        return self.count

    def __getitem__(self, item):
        return (torch.tensor([10 * item, item, 0])[:, None, None] + torch.arange(16).view(4, 4)).to(torch.uint8)
