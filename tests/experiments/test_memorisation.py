import pytest
import torch

from data.loader import to_float
from diffusion.mollifier import GaussianMollifier
from experiments.metrics.images import nearest_images


class Images:
    """A data set of given uint8 images [N, C, H, W]."""

    def __init__(self, images):
        self.images = images
        self.size = tuple(images.shape[-2:])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


@pytest.fixture
def dataset():
    generator = torch.Generator().manual_seed(0)
    return Images(torch.randint(0, 256, (23, 3, 12, 16), dtype=torch.uint8, generator=generator))


@pytest.fixture
def queries():
    return torch.rand(5, 3, 12, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


MOLLIFIER = GaussianMollifier(1.0, (12, 16))


@pytest.mark.parametrize("batch_size", [1, 4, 23])
def test_is_the_search_through_all_pairs(dataset, queries, batch_size):
    found = nearest_images(queries, dataset, MOLLIFIER, k=4, batch_size=batch_size)
    for i, query in enumerate(queries):
        pairs = []
        for item, image in enumerate(dataset.images):
            sides = [(MOLLIFIER.blur(query) - MOLLIFIER.blur(to_float(side))).square().mean().item()
                     for side in (image, image.flip(-1))]
            pairs.append((min(sides), item, sides[1] < sides[0]))
        expected = sorted(pairs)[:4]
        torch.testing.assert_close(found.distance[i], torch.tensor([pair[0] for pair in expected]))
        assert found.item[i].tolist() == [pair[1] for pair in expected]
        assert found.mirrored[i].tolist() == [pair[2] for pair in expected]


def test_copies_and_mirrored_copies_are_found(dataset):
    copies = torch.stack([to_float(dataset[7]), to_float(dataset[2]).flip(-1)])
    found = nearest_images(copies, dataset, MOLLIFIER, k=1)
    assert found.item.flatten().tolist() == [7, 2] and found.mirrored.flatten().tolist() == [False, True]
    assert found.distance.max() < 1e-5


def test_a_limit_spreads_over_the_data_set(dataset, queries):
    found = nearest_images(queries, dataset, MOLLIFIER, k=5, limit=5)
    assert all(sorted(items) == [0, 4, 9, 13, 18] for items in found.item.tolist())
    assert nearest_images(queries, dataset, MOLLIFIER, k=30, limit=100).item.shape == (5, 23)


def test_images_of_another_size_are_brought_to_that_of_the_data_set(dataset):
    large = torch.nn.functional.interpolate(to_float(dataset[3])[None], scale_factor=3, mode="bicubic")
    assert nearest_images(large, dataset, MOLLIFIER, k=1).item.item() == 3
