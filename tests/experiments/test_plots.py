"""Grids of labelled columns, and animations."""

import numpy as np
import torch
from PIL import Image, ImageSequence

from experiments.lib.plots import LABEL_HEIGHT, MIN_WIDTH, save_gif, save_grid


def test_every_image_is_in_its_column_enlarged_by_a_whole_factor(tmp_path):
    small, large = (torch.randint(256, (3, side, side), dtype=torch.uint8) for side in (16, 32))
    grey = torch.full((1, 32, 32), 7, dtype=torch.uint8)
    save_grid({"input": [small, small], "result": [large], "grey": [grey, grey]}, tmp_path / "grid.png")
    grid = np.array(Image.open(tmp_path / "grid.png"))
    side = MIN_WIDTH  # 3 times 32
    assert grid.shape == (LABEL_HEIGHT + 2 * side, 3 * side, 3)
    cell = grid[LABEL_HEIGHT + 1:LABEL_HEIGHT + side:3, side + 1:2 * side:3]
    assert np.array_equal(cell, large.permute(1, 2, 0).numpy())
    assert np.array_equal(grid[LABEL_HEIGHT + side + 2::6, 2:side:6], small.permute(1, 2, 0).numpy())
    assert (grid[LABEL_HEIGHT:, 2 * side:] == 7).all()
    assert (grid[LABEL_HEIGHT + side:, side:2 * side] == 255).all()  # the second column is shorter
    assert all((grid[:LABEL_HEIGHT, i * side:(i + 1) * side] < 128).any() for i in range(3))  # labels


def test_large_images_keep_their_size(tmp_path):
    image = torch.zeros(3, 40, 130, dtype=torch.uint8)
    save_grid({"a": [image], "b": [image]}, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (260, LABEL_HEIGHT + 40)


def test_an_animation_runs_forward_and_backward(tmp_path):
    frames = [[torch.full((1, 8, 48), shade, dtype=torch.uint8)] * 3 for shade in (0, 60, 120, 180)]
    save_gif(frames, tmp_path / "a.gif", columns=2)
    with Image.open(tmp_path / "a.gif") as animation:
        shades, times = zip(*((np.array(frame.convert("L"))[0, 0], frame.info["duration"])
                              for frame in ImageSequence.Iterator(animation)), strict=True)
        assert animation.info["loop"] == 0 and animation.size == (2 * MIN_WIDTH, 2 * 16)
    assert shades == (0, 60, 120, 180, 120, 60) and set(times) == {120}
