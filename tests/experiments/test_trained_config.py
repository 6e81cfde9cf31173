"""Scripts that use a trained model read its architecture from the run, unless the command line contradicts it."""

import pytest

from tests.data.layouts import write_folder
from tests.scripts import only_line, run_script
from tests.tiny import tiny_config, tiny_latent_config, write_config_file

pytestmark = pytest.mark.slow
TRAINED_WITH = ("nf=4", "uno_mults=(2,2)", "z_dim=5")


@pytest.fixture(scope="module")
def overridden(tmp_path_factory):
    """(arguments of a stage-1 run, of its stage-2 run), without the fields of TRAINED_WITH that it was trained with."""
    folder = tmp_path_factory.mktemp("overridden")
    write_folder(folder / "data", 80)
    ae = write_config_file(tiny_config(folder / "checkpoints", folder / "data", "folder"), folder / "ae.py")
    latent = write_config_file(tiny_latent_config(folder / "checkpoints"), folder / "latent.py")
    both = ["--config", latent, "--decoder_config", ae]
    assert run_script("train_inf_ae_diffusion.py", "--config", ae, "--config.diffusion.gaussian_filter_std=1.5",
                      *(f"--config.model.{field}" for field in TRAINED_WITH)).code == 0
    assert run_script("train_latent_diffusion.py", *both, "--config.model.z_dim=5",
                      "--config.model.hid_channels=12").code == 0
    return ["--config", ae], both


def test_overrides_of_training_are_not_needed_again(overridden, tmp_path):
    single, both = overridden
    for script, configs, more in (
        ("experiments/generate_recons.py", single, ["--num_samples=2", "--sampling_steps=2"]),
        ("experiments/generate_samples.py", both, ["--num_samples=2", "--sampling_steps=2"]),
        ("experiments/inpaint.py", single, ["--num_samples=1", "--sampling_steps=2"]),
        ("experiments/export_weights.py", single, []),
    ):
        name = "w.safetensors" if "export" in script else "images"
        ran = run_script(script, *configs, *more, "--output", tmp_path / script.split("/")[-1] / name)
        assert ran.code == 0, ran.err
    ran = run_script("experiments/spectrum.py", *single, "--samples", tmp_path / "generate_samples.py" / "images",
                     "--output", tmp_path / "spectrum")
    assert ran.code == 0, ran.err
    assert "wavenumbers 1 to 8;" in ran.out  # those that the mollifier of the run keeps; that of the config: 12


@pytest.mark.parametrize(("field", "message"), [
    ("model.nf=6", "was trained with model.nf=4, the config has 6"),
    ("model.uno_mults=(1,2)", r"was trained with model.uno_mults=[2, 2], the config has (1, 2)"),
    ("diffusion.gaussian_filter_std=1.0", "was trained with diffusion.gaussian_filter_std=1.5, the config has 1.0"),
])
def test_a_field_on_the_command_line_that_contradicts_the_run_is_refused(overridden, tmp_path, field, message):
    ran = run_script("experiments/generate_recons.py", *overridden[0], f"--config.{field}", "--num_samples=2",
                     "--sampling_steps=2", "--output", tmp_path / "r")
    assert message.replace("[", "(").replace("]", ")") in only_line(ran).replace("[", "(").replace("]", ")")


def test_training_does_not_read_the_fields_of_the_run(overridden):
    ran = run_script("train_inf_ae_diffusion.py", *overridden[0])
    assert "model.nf=4" in only_line(ran)


def test_a_damaged_config_json_is_named(overridden, tmp_path):
    record = next(path for path in (tmp_path.parent / "overridden0" / "checkpoints").rglob("config.json")
                  if "mc_integral" in path.read_text())
    content = record.read_text()
    for damaged in (content[:100], "[]", "{}"):
        record.write_text(damaged)
        ran = run_script("experiments/generate_recons.py", *overridden[0], "--num_samples=2", "--sampling_steps=2",
                         "--output", tmp_path / "r")
        assert str(record) in only_line(ran) and "repair or remove" in only_line(ran)
    record.write_text(content)
