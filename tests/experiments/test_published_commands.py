"""The command lines of the original readme on every data layout, with overrides that shrink the models."""

import shlex

import pytest

from tests.data.layouts import write_folder, write_lsun
from tests.scripts import run_script

pytestmark = pytest.mark.slow

TRAIN = ('train_inf_ae_diffusion.py --config configs/ffhq_256_config.py '
         '--config.run.experiment="ffhq_mollified_256"')
LATENT = ('train_latent_diffusion.py --config configs/ffhq_latent_config.py '
          '--config.run.experiment="ffhq_mollified_256_sampler" --decoder_config configs/ffhq_256_config.py '
          '--decoder_config.run.experiment="ffhq_mollified_256"')
SAMPLE = LATENT.replace("train_latent_diffusion.py", "experiments/generate_samples.py")
DEVICE = "--{0}.run.device=cpu --{0}.train.precision=fp32 --{0}.train.sample_size=1 --{0}.train.max_steps=1"
SMALL_AUTOENCODER = DEVICE + (
    " --{0}.data.img_size=16 --{0}.data.num_workers=0 --{0}.train.batch_size=2 --{0}.model.nf=8"
    " --{0}.model.time_emb_dim=8 --{0}.model.num_conv_blocks=1 --{0}.model.kernel_size=3 --{0}.model.uno_res=16"
    " --{0}.model.uno_base_channels=8 --{0}.model.z_dim=6 --{0}.diffusion.steps=4")
SMALL_LATENT = DEVICE + (
    " --{0}.data.fid_samples=2 --{0}.train.batch_size=4 --{0}.model.z_dim=6 --{0}.model.num_layers=2"
    " --{0}.model.hid_channels=8 --{0}.diffusion.steps=4")


def ffhq(root):
    write_folder(root, 21, "{:05d}/00000.png")


def celeba(root):
    write_folder(root / "256", 21, "{:05d}.jpg")


def churches(root):
    write_lsun(root, "train", 5)
    write_lsun(root, "val", 3)


@pytest.mark.parametrize("name, layout", [("ffhq", ffhq), ("celeba", celeba), ("churches", churches)])
def test_train_both_stages_and_sample(tmp_path, monkeypatch, name, layout):
    data = tmp_path / "data"
    layout(data)

    def run(command, small, data_flag):
        command = command.replace("ffhq", name).replace(f"{name}_mollified", "ffhq_mollified")
        words = shlex.split(command) + small.split() + [f"--{data_flag}.data.root_dir={data}"]
        words += [f"--{flag}.run.output_dir={tmp_path / 'out'}" for flag in ("config", "decoder_config")
                  if f"--{flag}" in words]
        if "experiments/" in command:
            words += ["--sampling_steps=2", f"--output={tmp_path / 'samples'}"]
        return run_script(*words)

    single, both = SMALL_AUTOENCODER.format("config"), " ".join(
        [SMALL_LATENT.format("config"), SMALL_AUTOENCODER.format("decoder_config")])
    for command, small, flag in ((TRAIN, single, "config"), (LATENT, both, "decoder_config"),
                                 (SAMPLE, both, "decoder_config")):
        result = run(command, small, flag)
        assert result.code == 0, result.err
    assert sorted(path.name for path in (tmp_path / "samples").glob("*.png")) == ["00000.png", "00001.png"]
