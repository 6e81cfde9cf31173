"""Write the EMA weights of a run as safetensors, with the config and the latents' statistics, to share or to archive.

    python experiments/export_weights.py --config configs/ffhq_256_config.py [--which best] [--output FILE]

Of an autoencoder it is weights.safetensors in the run's folder, of a latent model latent_weights.safetensors. Every
script that needs a trained model takes these where the folder of the run holds no checkpoint.
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
WHICH = flags.DEFINE_enum("which", None, ["newest", "best"], "which checkpoint; default: the one that is sampled from, "
                          "the newest of an autoencoder and the best of a latent model")
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
    print(f"{output}: {count / 1e6:.2f} M parameters of step {saved['step']}; to use it, put it as "
          f"{prefix}weights.safetensors into the folder of a run without a checkpoint, <output_dir>/<experiment>/")


if __name__ == "__main__":
    cli.run(main)
