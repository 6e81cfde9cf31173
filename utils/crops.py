"""Random crops of images at full resolution, for scores that see detail which resizing would remove."""

from utils.rng import seed_of


class Crops:
    """`count` square crops from uint8 images [C, H, W] of one size (H, W), as uint8 tensors [C, side, side].

    Crop i is of image i · N // count, so that all of the N images take part evenly, at a place that is a function of i
    alone. Nothing is resized: the images are to be given at the resolution that is to be judged.
    Raises ValueError for a side that does not fit.
    """

    def __init__(self, images, size, count, side):
        if not 1 <= side <= min(size):
            raise ValueError(f"crops of {side}x{side} do not fit into images of {size[0]}x{size[1]}")
        self.images, self.size, self.count, self.side = images, size, count, side

    def __len__(self):
        return self.count

    def __getitem__(self, place):
        if not 0 <= place < self.count:
            raise IndexError(f"crop {place} of {self.count}")
        image = self.images[place * len(self.images) // self.count]
        top, left = (seed_of("crop", axis, place) % (length - self.side + 1) for axis, length in enumerate(self.size))
        return image[:, top:top + self.side, left:left + self.side]
