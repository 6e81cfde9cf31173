"""All scores of samples against real images, in the features of one network."""

from torch.utils.data import ConcatDataset

from utils import distributed
from utils.crops import Crops
from utils.feature_cache import cached_statistics
from utils.features import PREPROCESSING_VERSION, extract
from utils.manifolds import precision_recall
from utils.metrics import score, statistics


def compare(samples, real, model, cache, crops=None, crop_size=None, neighbours=3, batch_size=64, num_workers=0):
    """Dict of the numbers of metrics.score, precision and recall, and of what the real images were.

    Several processes share the work of the network; the main one gets the result, the others None.

    samples     images as uint8 [C, H, W] with their common `size` (H, W), such as a SampleFolder
    real        data sets (data.datasets.base) that together are the real images; all of one size
    model       utils.features.FeatureModel
    cache       folder in which the statistics of the real images are kept
    crops       compare so many random crops of crop_size² pixels of either side; None: whole images, resized
    neighbours  k of precision and recall
    batch_size, num_workers   of the feature network, and processes that read and resize
    """
    def of(images, size, label):
        pieces = Crops(images, size, crops, crop_size) if crops else images
        features = extract(pieces, model, batch_size=batch_size, num_workers=num_workers, progress=label)
        return statistics(features) if distributed.is_main() else None

    key = {"fingerprints": [part.fingerprint() for part in real], "feature_model": model.name,
           "weights_sha256": model.sha256, "preprocessing": PREPROCESSING_VERSION, "crops": crops,
           "crop_size": crop_size if crops else None,
           "device": model.device.type}  # CLIP computes in half precision on a GPU
    height, width = size = real[0].size
    real_statistics = cached_statistics(cache, f"{real[0].name}_{height}x{width}_{model.name}", key,
                                        lambda: of(ConcatDataset(real), size, "real images"))
    sample_statistics = of(samples, samples.size, "samples")
    if not distributed.is_main():
        return None
    scores = score(sample_statistics, real_statistics)
    scores["precision"], scores["recall"] = precision_recall(sample_statistics.features, real_statistics.features,
                                                             neighbours, model.device)
    return {**scores, "neighbours": neighbours, "real_images": [part.describe() for part in real], **key}
