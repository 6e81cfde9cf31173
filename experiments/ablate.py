r"""Train and score variants of a config within a budget: one table, in results.md, .csv, .json and .png.

    python experiments/ablate.py --config configs/ffhq_128_config.py --steps 100000 --output ablations
    python experiments/ablate.py --config configs/demo_config.py --minutes 1 --axes subsampling,kernel \
        --feature_model efficientnet_lite0

The axes are the functions of configs/ablations.py. Every variant is trained by train_inf_ae_diffusion.py in its own
process, and then scored on held-out images: by the denoising error (docs/method.md, 7.4) and by its reconstructions
(PSNR after the same blur for all variants, KID). The same command resumes an interrupted ablation; variants with a
result are not run again, and axes can be added. Fields given as --config.… apply to all variants.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from configs import ablations
from data.datasets import build_dataset, log_images
from experiments.lib.ablation_runs import (
    FirstImages,
    check_runs,
    config_arguments,
    evaluate,
    make_variant,
    steps_in,
    train,
)
from experiments.lib.plots import write_results
from experiments.lib.sampling import float_flag, sampler_flag, steps_flag
from experiments.metrics.features import NETWORKS, build_feature_model
from utils import cli, config
from utils.device import environment, resolve_device
from utils.errors import UserError
from utils.files import check_writable, read_json, write_json

CONFIG = config.define_config_flag("config", "base config, whose fields the variants change")
AXES = flags.DEFINE_list("axes", list(ablations.AXES), "axes of configs/ablations.py")
STEPS = flags.DEFINE_integer("steps", None, "training steps of a variant", lower_bound=10)
MINUTES = float_flag("minutes", None, "training time of a variant, instead of --steps", low=0.05)
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 256, "largest number of held-out images to score", lower_bound=4)
SAMPLER, SAMPLING_STEPS = sampler_flag(), steps_flag()
FEATURE_MODEL = flags.DEFINE_enum("feature_model", "clip_vit_b_32", list(NETWORKS), "network of the features for KID")
WEIGHTS = flags.DEFINE_string("weights", None, "file with the weights of the feature network")
DOWNLOAD = flags.DEFINE_bool("download", False, "download the weights if they are not on this machine")
OUTPUT = flags.DEFINE_string("output", "ablations", "folder for the runs and the table")

COLUMNS = {  # of results.md
    "axis": lambda row: row["axis"], "variant": lambda row: row["variant"],
    "denoising error": lambda row: f"{row['denoising_error']:.5f}",
    "PSNR (dB)": lambda row: "–" if row["psnr"] is None else f"{row['psnr']:.2f}",
    "KID": lambda row: f"{row['kid']:.4f} ± {row['kid_standard_error']:.4f}",
    "steps": lambda row: str(row["steps"]), "ms per step": lambda row: f"{1000 * row['seconds_per_step']:.0f}",
    "peak memory (GB)": lambda row: f"{row['peak_memory_gb']:.2f}",
    "parameters (M)": lambda row: f"{row['parameters'] / 1e6:.2f}",
}
PANELS = {  # of results.png
    "denoising error": lambda row: (row["denoising_error"], None),
    "PSNR (dB)": lambda row: None if row["psnr"] is None else (row["psnr"], None),
    "KID": lambda row: (row["kid"], row["kid_standard_error"]),
    "ms per step": lambda row: (1000 * row["seconds_per_step"], None),
    "peak memory (GB)": lambda row: (row["peak_memory_gb"], None),
}


def main():
    base = config.read_autoencoder_config(CONFIG)
    if (STEPS.value is None) == (MINUTES.value is None):
        raise UserError("give the budget of a variant either as --steps or as --minutes")
    if (unknown := set(AXES.value) - set(ablations.AXES)) or not AXES.value:
        raise UserError(f"--axes={','.join(sorted(unknown))} is unknown; choose from {','.join(ablations.AXES)}")
    output = Path(OUTPUT.value)
    check_writable(output, f"--output={output}")
    variants = [make_variant(axis, name, changes) for axis in AXES.value
                for name, changes in ablations.get_variants(axis, base).items()]
    configs = {variant.experiment: variant.config(base, output) for variant in variants}
    heldout = FirstImages(build_dataset(base, train=False), NUM_SAMPLES.value)
    check_runs(base, configs.values(), heldout, SAMPLING_STEPS.value, SAMPLER.value)
    network = build_feature_model(FEATURE_MODEL.value, resolve_device(base.run.device), WEIGHTS.value, DOWNLOAD.value,
                                  base.data.channels)
    check_settings(output / "settings.json", base)
    log_images(build_dataset(base, train=True), heldout.dataset)

    failed = []
    for number, variant in enumerate(variants, 1):
        print(f"{number} of {len(variants)}: {variant.axis}, {variant.name}", file=sys.stderr)
        if not run(variant, configs[variant.experiment], heldout, network):
            failed.append(f"{variant.axis}, {variant.name}")
        write_table(output, variants)
    print(f"results: {output / 'results.md'}")
    if failed:
        print(f"error: training failed for {'; '.join(failed)}; the same command retries", file=sys.stderr)
        sys.exit(1)


def check_settings(path, base):
    """Record what all results of a folder have in common; UserError if it holds results with other settings."""
    settings = {"config": base.to_dict(), **{flag.name: flag.value for flag in (
        STEPS, MINUTES, NUM_SAMPLES, SAMPLER, SAMPLING_STEPS, FEATURE_MODEL)}}
    for field in ("output_dir", "experiment"):
        del settings["config"]["run"][field]
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        write_json(path, settings)
        return
    saved = read_json(path)
    different = [name for name in settings if saved.get(name) != settings[name]]
    if different:
        raise UserError(f"--output={OUTPUT.value} holds results with another {' and another '.join(different)}; choose "
                        "another folder, or repeat the command that wrote them")


def run(variant, variant_config, heldout, network):
    """Train and score a variant, unless it has a result; True if it has one now."""
    record = config.run_dir(variant_config) / "result.json"
    if record.exists():
        return True
    arguments = config_arguments(sys.argv[1:])
    steps = STEPS.value or steps_in(MINUTES.value, variant_config, variant.changes, arguments)
    if steps is None or not train(variant_config, variant.changes, arguments, steps):
        return False
    scores = evaluate(variant_config, heldout, SAMPLER.value, SAMPLING_STEPS.value, network)
    write_json(record, {**scores, "commit": environment()["commit"]})
    return True


def write_table(output, variants):
    """Write results.* of the variants that have a result."""
    rows = [{"axis": variant.axis, "variant": variant.name,
             "changes": " ".join(f"{name}={value}" for name, value in variant.changes.items()),
             **json.loads(record.read_text())}
            for variant in variants if (record := output / variant.experiment / "result.json").exists()]
    if rows:
        write_results(output, rows, COLUMNS, PANELS)


if __name__ == "__main__":
    cli.run(main)
