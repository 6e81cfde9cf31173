import pytest
import torch

from experiments.metrics.features import Crops


def numbered(count, height, width):
    """Images whose pixels say which image and which place they are: channels (image, row, column)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return [torch.stack([torch.full_like(rows, i), rows, columns]).to(torch.uint8) for i in range(count)]


def corner(crop):
    return tuple(crop[:, 0, 0].tolist())


@pytest.mark.parametrize(("images", "count"), [(5, 20), (20, 5), (7, 7), (3, 10)])
def test_every_image_takes_part_as_often(images, count):
    crops = Crops(numbered(images, 20, 30), (20, 30), count, 8)
    assert len(crops) == count
    taken = [corner(crops[i])[0] for i in range(count)]
    times = [taken.count(image) for image in range(images)]
    assert sum(times) == count and max(times) - min(times) <= 1
    assert taken == sorted(taken)  # so that a file is read only once in a row


def test_crops_are_pieces_of_the_image_as_it_is():
    crops = Crops(numbered(4, 20, 30), (20, 30), 40, 8)
    for crop in crops:
        _, top, left = corner(crop)
        assert crop.shape == (3, 8, 8)
        torch.testing.assert_close(crop[1, :, 0], torch.arange(top, top + 8, dtype=torch.uint8))
        torch.testing.assert_close(crop[2, 0], torch.arange(left, left + 8, dtype=torch.uint8))


def test_places_reach_everywhere_and_depend_on_the_index_alone():
    crops = Crops(numbered(1, 12, 15), (12, 15), 400, 10)
    places = [corner(crop)[1:] for crop in crops]
    assert set(places) == {(top, left) for top in range(3) for left in range(6)}
    assert [corner(Crops(numbered(1, 12, 15), (12, 15), 400, 10)[i])[1:] for i in (399, 0, 7)] == [
        places[399], places[0], places[7]]


def test_a_crop_of_the_whole_image():
    images = numbered(2, 9, 9)
    assert torch.equal(Crops(images, (9, 9), 2, 9)[1], images[1])


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="crops of 13x13 do not fit into images of 12x15"):
        Crops([], (12, 15), 3, 13)
    with pytest.raises(IndexError):
        Crops(numbered(1, 9, 9), (9, 9), 2, 4)[2]
