"""One line and the right exit code for every way to get a command line or a config wrong."""

import pytest

from tests.scripts import only_line, run_script
from tests.tiny import tiny_config, tiny_latent_config, write_config_file

TRAIN = "train_inf_ae_diffusion.py"


@pytest.fixture
def base(tmp_path):
    return ["--config", write_config_file(tiny_config(tmp_path / "out"), tmp_path / "config.py")]


# overrides, and what the one line must name
MISTAKES = [
    (["--config.data.imgsize=32"], "img_size"),
    (["--config.nothing.here=1"], "nothing"),
    (["--config.data.img_size=abc"], "img_size"),
    (["--config.data.img_size=8"], "config.data.img_size=8 must be at least 16"),
    (["--config.data.channels=2"], "config.data.channels=2 must be one of 1, 3"),
    (["--config.data.name=imagenet"], "imagenet"),
    (["--config.data.name=folder", "--config.data.root_dir=/nowhere/at/all"], "/nowhere/at/all"),
    (["--config.data.img_size=512"], "512"),
    (["--config.mc_integral.q_sample=257"], "q_sample=257"),
    (["--config.mc_integral.q_sample=2"], "q_sample=2"),
    (["--config.mc_integral.type=grid"], "grid"),
    (["--config.model.kernel_size=4"], "kernel_size=4"),
    (["--config.model.backend=cudnn"], "model.backend='cudnn'"),
    (["--config.model.backend=torchsparse"], "torchsparse"),
    (["--config.model.attention=fast"], "attention"),
    (["--config.model.uno_res=9"], "uno_res"),
    (["--config.model.uno_attn_resolutions=(5,)"], "uno_attn_resolutions"),
    (["--config.model.uno_blocks_per_level=(1,)"], "uno_blocks_per_level"),
    (["--config.model.uno_conv_type=wavelet"], "uno_conv_type"),
    (["--config.model.uno_dropout=1.0"], "uno_dropout=1.0 must be below 1.0"),
    (["--config.diffusion.noise_schedule=sigmoid"], "noise_schedule"),
    (["--config.diffusion.model_mean_type=score"], "model_mean_type"),
    (["--config.diffusion.loss_type=huber"], "loss_type"),
    (["--config.diffusion.schedule_sampler=best"], "schedule_sampler"),
    (["--config.diffusion.mollifier_type=box"], "mollifier_type"),
    (["--config.diffusion.gaussian_filter_std=-1.0"], "gaussian_filter_std=-1.0 must be at least 0"),
    (["--config.diffusion.precondition", "--config.diffusion.model_mean_type=v"], "precondition"),
    (["--config.optimizer.decay=step"], "optimizer.decay='step' must be one of"),
    (["--config.optimizer.adam_beta1=1.5"], "adam_beta1=1.5 must be below 1.0"),
    (["--config.train.batch_size=0"], "batch_size=0 must be at least 1"),
    (["--config.train.precision=int8"], "precision='int8' must be one of"),
    (["--config.train.precision=fp16"], "precision='fp16' needs a GPU"),
    (["--config.run.device=tpu"], "run.device='tpu'"),
    (["--config.run.device=cuda:17"], "run.device='cuda:17'"),
    (["--config.run.experiment=../outside"], "run.experiment='../outside'"),
    (["--config.run.wandb_mode=sometimes"], "wandb_mode='sometimes' must be one of"),
    (["--unknown_flag=1"], "unknown_flag"),
    (["stray"], "stray"),
]


@pytest.mark.parametrize("overrides, named", MISTAKES, ids=[" ".join(row[0]) for row in MISTAKES])
def test_a_mistake_is_one_line_and_nothing_is_written(base, tmp_path, overrides, named):
    assert named in only_line(run_script(TRAIN, *base, *overrides))
    assert not (tmp_path / "out").exists()


def test_a_config_that_is_missing_absent_or_of_the_other_stage(tmp_path):
    assert "--config is missing" in only_line(run_script(TRAIN))
    assert "nope.py" in only_line(run_script(TRAIN, "--config", tmp_path / "nope.py"))
    latent = write_config_file(tiny_latent_config(tmp_path), tmp_path / "latent.py")
    assert "is not an autoencoder config" in only_line(run_script(TRAIN, "--config", latent))


def test_a_config_file_with_an_unknown_or_mistyped_field(tmp_path):
    config = tiny_config(tmp_path)
    config.model.channel_mult = 3
    path = write_config_file(config, tmp_path / "config.py")
    assert "config.model.channel_mult=3 is not a known field" in only_line(run_script(TRAIN, "--config", path))
    config = tiny_config(tmp_path)
    del config.model["nf"]
    path = write_config_file(config, tmp_path / "config2.py")
    assert "lacks model.nf" in only_line(run_script(TRAIN, "--config", path))
    config = tiny_config(tmp_path).to_dict()
    config["train"]["batch_size"] = "many"
    (tmp_path / "config3.py").write_text(f"from ml_collections import ConfigDict\ndef get_config():\n"
                                         f"    return ConfigDict({config!r})\n")
    result = run_script(TRAIN, "--config", tmp_path / "config3.py")
    assert "config.train.batch_size='many' must be of type int" in only_line(result)


def test_wandb_online_without_a_login_does_not_wait(base, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    result = run_script(TRAIN, *base, "--config.run.wandb_mode=online")
    assert "wandb login" in result.err.splitlines()[-1] and result.code == 2
