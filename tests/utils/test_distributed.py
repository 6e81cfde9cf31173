"""Several ranks: they divide the work and change nothing else; how they end when one of them fails."""

import numpy as np
import pytest
import torch

from data.images import read_image
from tests.data.layouts import write_folder
from tests.scripts import only_line, own_lines, run_script, torchrun
from tests.tiny import tiny_config, tiny_latent_config, write_config_file
from tests.utils.distributed_worker import shared_work
from utils import distributed
from utils.checkpoint import load_checkpoint
from utils.logging import read_metrics

WORKER = "tests/utils/distributed_worker.py"
STAGE_1, STAGE_2 = "train_inf_ae_diffusion.py", "train_latent_diffusion.py"
SAMPLES = "experiments/generate_samples.py"


def succeed(result):
    assert result.code == 0, result.err


def test_one_process_needs_nobody():
    values = torch.arange(3.0)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.any_rank(True) is True and distributed.any_rank(0) is False
    assert distributed.gather(values) is values and distributed.from_main(lambda: 5) == 5
    assert list(distributed.share(4)) == list(distributed.deal(range(4))) == [0, 1, 2, 3]
    assert torch.equal(distributed.concatenate([values[None], values[None]]), torch.stack([values, values]))


@pytest.fixture(scope="module")
def works(tmp_path_factory):
    """What each of two processes got, (helpers, shared work), and the shared work in one."""
    folder = tmp_path_factory.mktemp("works")
    (folder / "alone").mkdir()
    succeed(torchrun(WORKER, "works", folder))
    return *(torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)), shared_work(folder / "alone")


@pytest.mark.slow
def test_helpers(works):
    (first, _), (second, _), _ = works
    assert (first["rank"], second["rank"], first["world"], second["world"]) == (0, 1, 2, 2)
    assert (first["main"], second["main"]) == (True, False)
    assert (first["share"], second["share"]) == ([0, 1], [2, 3, 4])
    assert [sorted(a + b) for a, b in zip(first["deal"], second["deal"], strict=True)] == [[*range(7)], [*range(3)]]
    for results in (first, second):
        assert results["any"] == [False, True, True]
        assert results["from_main"] == ["made by", 0]
        assert results["mean"] == {"a": 0.5, "b": 2.0}
        assert results["gather"].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
        assert results["concatenate"].tolist() == [[value] * 3 for value in (0, 0, 10, 1, 1, 11, 11)]
        assert torch.equal(results["of one alone"], torch.ones(2, 3))


@pytest.mark.slow
def test_what_is_not_finite_in_one_process_is_left_out_in_all(works):
    (first, _), (second, _), _ = works
    (count, weights), (other_count, others) = first["bad steps"], second["bad steps"]
    assert count == other_count == 2
    assert all(torch.equal(value, others[name]) and value.isfinite().all() for name, value in weights.items())


@pytest.mark.slow
def test_each_process_loads_its_part_of_every_batch(works):
    (_, first), (_, second), alone = works
    assert first["positions"] == [range(40, 42), range(42, 44), range(48, 50), range(50, 52)]
    assert second["positions"] == [range(44, 46), range(46, 48), range(52, 54), range(54, 56)]
    for name in ("index", "batches"):
        for a, b, whole in zip(first[name], second[name], alone[name], strict=True):
            assert len(a) == len(b) == 2 and torch.equal(torch.cat([a, b]), whole)


@pytest.mark.slow
def test_every_process_gets_the_results_of_all(works):
    (_, first), (_, second), alone = works
    assert sorted(first["made"] + second["made"]) == alone["made"] == [*range(7)]
    for name in ("images", "latents", "heldout", "features"):
        assert torch.equal(first[name], alone[name]) and torch.equal(second[name], alone[name]), name
    assert torch.equal(first["mean"], alone["mean"]) and second["mean"] is None  # only one has to know
    for name, value in alone["sampler"].items():
        assert torch.equal(first["sampler"][name], value) and torch.equal(second["sampler"][name], value), name
    assert not torch.equal(alone["sampler"]["losses"], torch.zeros_like(alone["sampler"]["losses"]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, arguments for stage 1, for both stages) where one process has trained stage 1 and two, half of it: one
    of them got a signal."""
    folder = tmp_path_factory.mktemp("runs")
    write_folder(folder / "data", 23)
    config, latent = tiny_config(folder, folder / "data", "folder"), tiny_latent_config(folder)
    for part in (config, latent):
        part.train.batch_size, part.train.max_steps, part.train.plot_graph_steps = 8, 12, 1
        part.diffusion.schedule_sampler, part.diffusion.steps = "loss-second-moment", 4
        part.run.experiment = f"{part.run.experiment}_alone"
    single = ["--config", write_config_file(config, folder / "ae.py")]
    both = ["--config", write_config_file(latent, folder / "latent.py"), "--decoder_config", single[1]]
    result = torchrun(WORKER, "is_stopped", folder, STAGE_1, *single, "--config.run.experiment=two")
    assert result.err.count(f"stopped by SIGUSR1 after step 6, saved in {folder}/two/checkpoint.pt; the same "
                            "command continues\n") >= 1 and "exitcode  : 75" in result.err, result.err
    succeed(run_script(STAGE_1, *single, "--config.train.accumulation_steps=2"))
    return folder, single, both


def losses(folder):
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def check_close(run, other, filename="checkpoint.pt"):
    """The two runs differ by no more than rounding, in the losses of every step and in the last state."""
    np.testing.assert_allclose(losses(run), losses(other), rtol=1e-4)
    run, other = load_checkpoint(run / filename), load_checkpoint(other / filename)
    assert run["step"] == other["step"]
    for group in ("modules", "ema"):
        for name, value in run[group].items():
            torch.testing.assert_close(value, other[group][name], rtol=1e-3, atol=1e-5)
    counts = run["state"]["timesteps"]["counts"]
    assert torch.equal(counts, other["state"]["timesteps"]["counts"]) and counts.sum() == 8 * run["step"]


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one_to_where_one_would_have_been(runs):
    """Two processes are two parts of a step, as are two accumulated batches: even dropout is the same."""
    folder, single, _ = runs
    assert len(losses(folder / "two")) == 6
    resumed = ["--config.run.experiment=two", "--config.train.accumulation_steps=2"]
    succeed(run_script(STAGE_1, *single, *resumed))
    assert len(losses(folder / "two")) == 12
    check_close(folder / "two", folder / "tiny_alone")
    names = load_checkpoint(folder / "two" / "checkpoint.pt")["modules"]
    assert all(name.startswith(("encoder.", "decoder.")) for name in names)


@pytest.mark.slow
def test_a_signal_comes_before_an_evaluation_and_ends_pictures_which_the_next_start_makes(runs):
    folder, single, _ = runs
    command = [STAGE_1, *single, "--config.run.experiment=pictures", "--config.train.plot_samples_steps=2"]
    result = torchrun(WORKER, "is_stopped_before_evaluation", folder, *command)
    assert "stopped by SIGUSR1 after step 2" in result.err and "evaluated first" not in result.err, result.err
    result = torchrun(WORKER, "is_stopped_in_pictures", folder, *command)
    assert f"stopped by SIGUSR1 after step 2, saved in {folder}/pictures/checkpoint.pt" in result.err, result.err
    assert not list(folder.glob("pictures/images/*"))
    succeed(torchrun(*command, "--config.train.max_steps=2"))  # the pictures are all there is to do, by one of two
    assert {path.name for path in folder.glob("pictures/images/*")} == {
        "reconstructions_0000002.png", "samples_0000002.png"}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "filename"), [(STAGE_1, "checkpoint.pt"), (STAGE_2, "latent_checkpoint.pt")])
def test_accumulated_steps_equal_whole_ones_without_dropout(runs, stage, filename):
    folder, single, both = runs
    command = {STAGE_1: [*single, "--config.model.uno_dropout=0.0"], STAGE_2: [*both, "--config.model.dropout=0.0"]}
    for name, parts in (("whole", 1), ("parts", 4)):
        succeed(run_script(stage, *command[stage], f"--config.run.experiment={stage}_{name}",
                           f"--config.train.accumulation_steps={parts}"))
    check_close(folder / f"{stage}_whole", folder / f"{stage}_parts", filename)


@pytest.mark.slow
def test_stage_2_and_its_latents_in_two_processes_that_accumulate_and_then_in_one(runs):
    folder, _, both = runs
    succeed(run_script(STAGE_2, *both, "--config.train.accumulation_steps=4"))
    two = [STAGE_2, *both, "--config.run.experiment=sampler_two"]
    succeed(torchrun(*two, "--config.train.accumulation_steps=2", "--config.train.max_steps=6"))
    assert len(losses(folder / "sampler_two")) == 6
    succeed(run_script(*two, "--config.train.accumulation_steps=4"))
    assert len(losses(folder / "sampler_two")) == 12
    check_close(folder / "sampler_two", folder / "tiny_sampler_alone", "latent_checkpoint.pt")
    ours, theirs = (load_checkpoint(folder / name / "latents.pt") for name in ("sampler_two", "tiny_sampler_alone"))
    assert torch.equal(ours["train"], theirs["train"]) and torch.equal(ours["heldout"], theirs["heldout"])


@pytest.mark.slow
def test_image_i_does_not_depend_on_the_number_of_processes(runs, tmp_path):
    """Nor does it matter if another number of them goes on with a folder."""
    _, _, both = runs
    command = [SAMPLES, *both, "--sampling_steps=3", "--num_samples=5", "--output", tmp_path / "s"]
    succeed(run_script(*command))
    alone = [read_image(tmp_path / "s" / f"{i:05d}.png").int() for i in range(5)]
    for i in (0, 2, 3):
        (tmp_path / "s" / f"{i:05d}.png").unlink()
    succeed(torchrun(*command))
    for i, image in enumerate(alone):
        again = read_image(tmp_path / "s" / f"{i:05d}.png").int()
        assert (image - again).abs().max() <= 1  # batched products may round differently


@pytest.mark.parametrize("processes, accumulation, line", [
    (3, 1, "config.train.batch_size=8 must be a multiple of 3, the number of processes (3) times config."
           "train.accumulation_steps=1"),
    (2, 3, "config.train.batch_size=8 must be a multiple of 6"),
    (1, 16, "config.train.batch_size=8 must be a multiple of 16"),
])
def test_a_batch_that_cannot_be_divided_is_one_line(tmp_path, monkeypatch, processes, accumulation, line):
    config = tiny_config(tmp_path / "out")
    config.train.batch_size, config.train.accumulation_steps = 8, accumulation
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    assert line in only_line(run_script(STAGE_1, "--config", write_config_file(config, tmp_path / "config.py")))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("case, line", [
    ("fails", "error: data.root_dir='x' is wrong (process 1 of 2)"),
    ("hangs", "error: waited 0.025 minutes for the other ranks; one of them hangs, or the network between them is "
              "broken (process 0 of 2)"),
])
def test_a_process_that_fails_stops_all_with_its_line_alone(tmp_path, case, line):
    result = torchrun(WORKER, case, tmp_path)
    lines, report = own_lines(result)
    assert result.code == 1 and lines == [line], result.err
    assert line in report  # torchrun repeats it at the end


@pytest.mark.slow
def test_a_process_that_is_killed_stops_all(tmp_path):
    result = torchrun(WORKER, "is_killed", tmp_path)
    lines, report = own_lines(result)
    assert result.code == 1 and "SIGKILL" in report
    assert all(line.startswith("error: lost the connection to another rank; it was killed")
               for line in lines)  # none where torchrun was faster


@pytest.mark.slow
def test_a_bug_shows_one_traceback(tmp_path):
    result = torchrun(WORKER, "has_a_bug", tmp_path)
    lines, report = own_lines(result)
    assert result.code == 1 and sum("Traceback" in line for line in lines) == 1
    assert "KeyError: 'no such thing'" in lines[-1]
    assert "KeyError('no such thing')" in report


def test_a_script_for_one_process_says_so(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert "works in one process" in only_line(run_script("experiments/report.py"))
