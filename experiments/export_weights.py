"""Write the EMA weights of a run as safetensors, with the config and, for a latent model, the mean and std of latents.

    python experiments/export_weights.py --config configs/ffhq_256_config.py [--which best] [--output FILE]

The default file is weights.safetensors, or latent_weights.safetensors for a latent model, in the folder of the run.
Scripts load it if that folder has no checkpoint.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from models.load import load_trained
from utils import cli, config
from utils.checkpoint import save_weights
from utils.errors import UserError
from utils.files import check_output_file

CONFIG = config.define_config_flag("config", "config of a trained autoencoder or latent model")
WHICH = flags.DEFINE_enum("which", None, ["newest", "best"], "checkpoint to export; default: the newest of an "
                          "autoencoder, the best of a latent model, as for sampling")
OUTPUT = flags.DEFINE_string("output", None, "the file to write; default: in the folder of the run")


def main():
    if CONFIG.value is not None and "mc_integral" in CONFIG.value:
        cfg, kind, prefix, which = config.read_trained_autoencoder_config(CONFIG), "autoencoder", "", "newest"
    else:
        cfg, kind, prefix, which = config.read_trained_latent_config(CONFIG), "latent", "latent_", "best"
    run = config.run_dir(cfg)
    output = Path(OUTPUT.value or run / f"{prefix}weights.safetensors")
    if output.suffix != ".safetensors":
        raise UserError(f"--output={output} must end with .safetensors")
    check_output_file(output, "output")
    name = f"{prefix}checkpoint.pt"
    saved = load_trained(run / (name if (WHICH.value or which) == "newest" else f"best_{name}"), kind, cfg)
    save_weights(output, saved)
    count = sum(tensor.numel() for tensor in saved["ema"].values())
    print(f"{output}: {count / 1e6:.2f} M parameters of step {saved['step']}; to use the file, copy it to "
          f"<output_dir>/<experiment>/{prefix}weights.safetensors")


if __name__ == "__main__":
    cli.run(main)
