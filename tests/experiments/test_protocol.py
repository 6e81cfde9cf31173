from experiments.metrics.fid import departures, describe

PAPER = {"num_samples": 50_000, "size": [256, 256], "real_images": ["ffhq: 66500 training images of 256x256"],
         "sampling": {"sampler": "ddim", "steps": 100, "eta": 0.0, "size": [256, 256]},
         "feature_model": "clip_vit_b_32", "crops": None, "crop_size": None}


def test_the_papers_protocol_departs_in_nothing():
    assert departures(PAPER) == []
    assert describe(PAPER) == ("50000 samples of 256x256 by ddim in 100 steps; ffhq: 66500 training images of 256x256; "
                               "8 bits, not flipped; features of clip_vit_b_32; the paper's")


def test_every_departure_is_named():
    other = {**PAPER, "num_samples": 1000, "sampling": {"sampler": "ddim", "steps": 50, "eta": 0.5},
             "feature_model": "inception_v3", "crops": 2000, "crop_size": 299}
    assert departures(other) == ["1000 samples", "50 steps", "eta 0.5", "features of inception_v3", "crops"]
    assert "2000 crops of 299² of each" in describe(other)


def test_an_unknown_origin_is_one_departure():
    unknown = {**PAPER, "sampling": {}}
    assert departures(unknown) == ["an unknown sampler"]
    assert "made in an unknown way" in describe(unknown)
    noise = {**PAPER, "sampling": {"what": "noise"}}
    assert departures(noise) == ["noise"] and "50000 samples of 256x256, noise; ffhq" in describe(noise)
