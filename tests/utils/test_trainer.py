"""The training loop on a regression problem: resuming, evaluation, stopping, what it writes and when."""

import functools
import itertools
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.tiny import tiny_config
from utils import checkpoint, rng
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.logging import RunLog, read_metrics, seconds_per_step, training_seconds
from utils.shutdown import Stopped
from utils.trainer import Trainer


class Counter:
    """State that changes the loss: forgetting it on resume would show."""

    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def batches_from(start):
    for step in itertools.count(start):
        yield rng.randn((5, 3), rng.generator("cpu", "batch", step))


def make_trainer(tmp_path, max_steps, loss=None, best=None, batches=batches_from, validate=lambda modules: {"v": 1.0},
                 plot=lambda modules, tick: {}, source="", best_from=0, **overrides):
    """A Trainer whose train() needs no arguments. Overrides are <section>__<field>=value."""
    config = tiny_config(tmp_path)
    config.run.experiment = "run"
    config.train.max_steps = max_steps
    config.train.validate_steps = 2
    for name, value in overrides.items():
        section, field = name.split("__")
        config[section][field] = value
    torch.manual_seed(0)
    modules = nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))})
    counter = Counter()

    def regression(modules, batch, step):
        counter.count += 1
        error = (modules["net"](batch) - batch.sum(1, keepdim=True)).square().mean()
        return {"loss": error * (1 + 0.1 * counter.count)}

    trainer = Trainer(config, "autoencoder", modules, loss or regression, torch.device("cpu"),
                      state={"counter": counter}, source=source, best=best, best_from=best_from)
    trainer.train = functools.partial(trainer.train, batches, validate, plot, plot_steps=0)
    return trainer


def simple_loss(modules, batch, step):
    return {"loss": modules["net"](batch).square().mean()}


def lines_of(tmp_path):
    return read_metrics(tmp_path / "run" / "metrics.jsonl")


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def die(*_, **__):
    raise KeyboardInterrupt


def test_a_run_in_two_parts_ends_in_the_same_checkpoint(tmp_path):
    make_trainer(tmp_path / "whole", 7).train()
    make_trainer(tmp_path / "parts", 3).train()
    make_trainer(tmp_path / "parts", 7).train()
    whole, parts = (load_checkpoint(tmp_path / name / "run" / "checkpoint.pt") for name in ("whole", "parts"))
    for name in set(whole) - {"config", "seconds"}:
        assert equal(whole[name], parts[name]), name
    losses = [[(line["step"], line["loss"]) for line in lines_of(tmp_path / name) if "loss" in line]
              for name in ("whole", "parts")]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [2, 4, 6]


def test_steps_alone_touch_no_file(tmp_path):
    """As a benchmark makes them, in a folder with a run that train() would continue."""
    make_trainer(tmp_path, 2).train()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    trainer, batches = make_trainer(tmp_path, 4), batches_from(0)
    assert equal(trainer.ema.modules.state_dict(), trainer.modules.state_dict())
    for _ in range(3):
        trainer.training_step(batches)
    assert trainer.step == 3 and trainer.sums["steps"] == 3
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_finished_run_is_left_unchanged(tmp_path, caplog):
    make_trainer(tmp_path, 2).train()
    before = (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, 2).train()
    assert "at step 2 already" in caplog.text
    assert (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns == before


def test_options_of_the_optimiser_come_from_the_config_after_resuming(tmp_path):
    make_trainer(tmp_path, 2).train()
    trainer = make_trainer(tmp_path, 4, optimizer__adam_beta1=0.5)
    trainer.resume()
    assert trainer.optimiser.adamw.param_groups[0]["betas"] == (0.5, 0.99)
    assert trainer.optimiser.adamw.state  # the moments come from the checkpoint


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_checkpoint_is_mapped_while_it_is_read_and_not_after_resuming(tmp_path):
    """So that several ranks share its memory, and give it back."""
    def is_mapped():
        return str(path) in Path("/proc/self/maps").read_text()

    make_trainer(tmp_path, 3, train__plot_graph_steps=2).train()  # between two log lines: sums are saved as well
    path = tmp_path / "run" / "checkpoint.pt"
    saved = load_checkpoint(path)
    assert is_mapped() and saved["sums"]
    del saved
    trainer = make_trainer(tmp_path, 4)
    trainer.resume()
    assert trainer.step == 3 and not is_mapped()


@pytest.mark.parametrize("change, said", [
    ({"source": "other"}, "trained on other data"),
    ({"train__load_checkpoint": False}, "train.load_checkpoint=False would overwrite"),
    ({"model__nf": 16}, "model.nf=8, the config has 16"),
])
def test_a_run_that_cannot_be_continued_is_refused(tmp_path, change, said):
    make_trainer(tmp_path, 2).train()
    with pytest.raises(UserError, match=said):
        make_trainer(tmp_path, 4, **change).resume()


HOLD = """import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("process 7 on host")
file.flush()
print("locked", flush=True)
sys.stdin.read()"""


def test_a_run_folder_that_cannot_be_written_is_named_before_its_lock_is_opened(tmp_path, monkeypatch):
    def refuse(*_):
        raise UserError("cannot be written")

    make_trainer(tmp_path, 1).train()
    monkeypatch.setattr("utils.trainer.check_writable", refuse)
    monkeypatch.setattr("utils.trainer.try_lock", lambda path: pytest.fail("opened the lock"))
    with pytest.raises(UserError, match="cannot be written"):
        make_trainer(tmp_path, 2).resume()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_a_run_that_another_process_trains_is_refused_until_it_ends(tmp_path):
    make_trainer(tmp_path, 2).train()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run" / ".lock"], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another process in .*run .process 7 on host.; wait for it"):
            make_trainer(tmp_path, 4).train()
        other.kill()  # however it ends
    assert {path: path.stat().st_mtime_ns for path in before if path.name != ".lock"} == {
        path: time for path, time in before.items() if path.name != ".lock"}
    trainer = make_trainer(tmp_path, 4)
    trainer.resume()
    ask = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    for code in (1, 0):  # locked while it trains, and not after
        assert subprocess.run([sys.executable, "-c", ask, tmp_path / "run" / ".lock"], stderr=subprocess.DEVNULL
                              ).returncode == code
        trainer.train()


def test_resuming_tells_the_step_and_what_has_changed(tmp_path, caplog):
    make_trainer(tmp_path, 2).train()
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, 4, run__seed=7, optimizer__decay="cosine").resume()
    first, *changes = caplog.messages[-4:]
    assert first == f"continuing {tmp_path}/run/checkpoint.pt from step 2"
    assert sorted(changes) == [f"changed since then: {change}" for change in (
        "optimizer.decay 'none' -> 'cosine'", "run.seed 0 -> 7", "train.max_steps 2 -> 4")]


def test_lines_after_the_checkpoint_are_written_again_and_unreadable_ones_are_named(tmp_path, caplog):
    make_trainer(tmp_path, 4).train()
    path = tmp_path / "run" / "metrics.jsonl"
    good = path.read_text()
    for line in ("not json", "[1]", '{"loss": 0.5}', '{"step": 3, "loss": "high"}', "\udcff"):
        path.write_text(line + "\n" + good, encoding="utf-8", errors="surrogateescape")
        edited = path.read_bytes()
        with pytest.raises(UserError, match="metrics.jsonl, line 1 is not a line of metrics"):
            make_trainer(tmp_path, 6).train()
        assert path.read_bytes() == edited
    path.write_text(good + '{"step": 6, "loss": 123.0}\n{"step": 7, "lo')
    make_trainer(tmp_path, 6).train()
    assert [line["step"] for line in lines_of(tmp_path) if "loss" in line] == [2, 4, 6]
    assert "123.0" not in path.read_text()
    assert caplog.text.count("line 6 was cut short and is left out") == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, bad):
    make_trainer(tmp_path, 2).train()

    def broken(modules, batch, step):
        return {"loss": modules["net"](batch).sum() * (bad if step == 3 else 1.0)}

    with pytest.raises(FloatingPointError, match="step 3, samples 12 to 15: loss term loss = -?(nan|inf)"):
        make_trainer(tmp_path, 8, loss=broken).train()
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert saved["step"] == 2
    assert all(torch.isfinite(value).all() for value in saved["modules"].values())


def test_the_best_average_is_kept(tmp_path):
    figures = iter([math.nan, 0.1, 1.0, 0.1, 2.0, 0.1])  # of the average and of the raw weights, in turn
    make_trainer(tmp_path, 6, best="v", validate=lambda modules: {"v": next(figures)}).train()
    best = load_checkpoint(tmp_path / "run" / "best_checkpoint.pt")
    assert best["step"] == 4 and best["value"] == 1.0
    figures = iter([1.5, 0.1, 0.5, 0.1])
    make_trainer(tmp_path, 10, best="v", validate=lambda modules: {"v": next(figures)}).train()
    assert load_checkpoint(tmp_path / "run" / "best_checkpoint.pt")["step"] == 10


def test_validation_sees_the_average_and_the_weights_in_eval_mode_without_gradients(tmp_path):
    seen = []

    def validate(modules):
        seen.append((modules, modules.training, torch.is_grad_enabled()))
        return {"v": float(len(seen))}

    trainer = make_trainer(tmp_path, 2, validate=validate)
    trainer.train()
    assert seen == [(trainer.ema.modules, False, False), (trainer.modules, False, False)]
    assert lines_of(tmp_path)[-1] == {"step": 2, "v": 1.0, "raw_v": 2.0, "pictures": 0}
    trainer.training_step(batches_from(2))
    assert trainer.modules.training


def test_the_best_average_is_chosen_where_the_loss_has_settled(tmp_path):
    """Until then the newest is taken, and a smaller figure from before does not count."""
    figures = iter([0.1, 9.0, 0.2, 9.0, 0.5, 9.0, 0.6, 9.0])  # of the average and of the raw weights, in turn
    for steps, kept in ((2, 2), (4, 4), (8, 6)):
        make_trainer(tmp_path, steps, best="v", best_from=5, validate=lambda modules: {"v": next(figures)}).train()
        assert load_checkpoint(tmp_path / "run" / "best_checkpoint.pt")["step"] == kept


def test_the_line_about_a_best_checkpoint_comes_when_it_is_on_disk(tmp_path, monkeypatch):
    save, numbers, seen = checkpoint.save_checkpoint, RunLog.numbers, []
    best = tmp_path / "run" / "best_checkpoint.pt"

    def slow(*arguments):
        time.sleep(0.05)
        save(*arguments)

    def watched(log, step, values):
        if "v" in values:
            seen.append((step, best.exists() and load_checkpoint(best)["step"]))
        numbers(log, step, values)

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    monkeypatch.setattr(RunLog, "numbers", watched)
    figures = iter([2.0, 0.0, 1.0, 0.0])
    make_trainer(tmp_path, 4, best="v", validate=lambda modules: {"v": next(figures)}).train()
    assert seen == [(2, 2), (4, 4)]


def test_a_checkpoint_that_cannot_be_written_stops_the_run_in_the_next_step(tmp_path, monkeypatch):
    def full(path, state, displaced=None):
        if state["step"] == 4:
            raise OSError(f"{path} could not be written (No space left on device)")
        save_checkpoint(path, state, displaced)

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    trainer = make_trainer(tmp_path, 100, train__checkpoint_steps=2, train__validate_steps=100)
    step = trainer.training_step

    def step_after_writing(batches):
        if trainer.checkpoints._writing is not None:
            trainer.checkpoints._writing.exception()  # waits
        step(batches)

    trainer.training_step = step_after_writing
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert trainer.step == 5 and load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 2


def test_temporary_files_of_killed_writers_are_removed(tmp_path):
    make_trainer(tmp_path, 2).train()
    for name in ("run/.checkpoint.pt.123.tmp", "run/.metrics.jsonl.9.tmp", "run/images/.samples_0000002.png.5.tmp"):
        (tmp_path / name).write_text("half")
    make_trainer(tmp_path, 3).train()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("where", ["validate", "plot"])
def test_a_run_killed_during_evaluation_has_saved_its_steps_and_evaluates_first_on_resume(tmp_path, where):
    calls = []

    def figures(modules):
        calls.append("validate")
        return {"v": 2.0 - len(calls)}

    options = {"best": "v", "train__validate_steps": 3}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, 3, **{"validate": figures, **options, where: die}).train()
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 3
    calls.clear()
    trainer = make_trainer(tmp_path, 3, validate=figures, **options)
    trainer.training_step = die
    trainer.train()
    assert [line["step"] for line in lines_of(tmp_path) if "v" in line] == [3]
    assert load_checkpoint(tmp_path / "run" / "best_checkpoint.pt")["step"] == 3
    make_trainer(tmp_path, 3, validate=die, **options).train()  # now it is finished


@pytest.mark.parametrize("amp, precision, expected", [(False, "bf16", torch.float32), (True, "bf16", torch.bfloat16),
                                                      (True, "fp32", torch.float32)])
def test_precision_reaches_the_network(tmp_path, amp, precision, expected):
    seen = []

    def loss(modules, batch, step):
        seen.append(modules["net"](batch).dtype)
        return simple_loss(modules, batch, step)

    trainer = make_trainer(tmp_path, 1, loss=loss, train__amp=amp, train__precision=precision)
    trainer.training_step(batches_from(0))
    assert seen == [expected]


@pytest.mark.parametrize("max_steps", [2, 4])
def test_a_signal_interrupts_sampling_and_the_same_command_repeats_it(tmp_path, max_steps):
    """At step 2, which is or is not the last."""
    calls = []

    def plot(modules, tick):
        for call in range(10):
            calls.append(call)
            if len(calls) == 3:
                signal.raise_signal(signal.SIGTERM)
            tick()
        return {"samples": torch.zeros(3, 4, 4, dtype=torch.uint8)}

    options = {"plot": plot, "train__plot_samples_steps": 2}
    with pytest.raises(Stopped, match="stopped by SIGTERM") as stopped:
        make_trainer(tmp_path, max_steps, **options).train()
    assert stopped.value.code == 75
    assert len(calls) == 3
    assert not list(tmp_path.rglob("*.png"))
    make_trainer(tmp_path, max_steps, **options).train()
    steps = list(range(2, max_steps + 1, 2))
    assert {path.name for path in tmp_path.rglob("*.png")} == {f"samples_{step:07}.png" for step in steps}
    assert [line["step"] for line in lines_of(tmp_path) if "v" in line] == steps


@pytest.mark.parametrize("name, code", [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGHUP", 75), ("SIGINT", 130)])
def test_a_signal_during_a_step_comes_before_the_evaluation_of_that_step(tmp_path, name, code):
    validated = []

    def loss(modules, batch, step):
        if step == 1:
            signal.raise_signal(getattr(signal, name))
        return simple_loss(modules, batch, step)

    def validate(modules):
        validated.append(trainer.step)
        return {"v": 1.0}

    trainer = make_trainer(tmp_path, 4, loss=loss, validate=validate)
    with pytest.raises(Stopped, match=f"stopped by {name} after step 2") as stopped:
        trainer.train()
    assert stopped.value.code == code and validated == []
    trainer = make_trainer(tmp_path, 4, validate=validate)
    trainer.train()
    assert validated == [2, 2, 4, 4]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_signal_before_the_first_step_saves_only_what_the_newest_file_does_not_hold(tmp_path, damaged):
    make_trainer(tmp_path, 4, train__checkpoint_steps=2, train__keep_checkpoints=2).train()
    path = tmp_path / "run" / "checkpoint.pt"
    if damaged:
        path.write_bytes(path.read_bytes()[:300])
    before = path.stat().st_mtime_ns
    step = 2 if damaged else 4
    with pytest.raises(Stopped, match=f"after step {step}, saved in {path}"):
        make_trainer(tmp_path, 8, train__keep_checkpoints=2,
                     batches=lambda start: signal.raise_signal(signal.SIGTERM)).train()
    assert load_checkpoint(path)["step"] == step
    assert (path.stat().st_mtime_ns == before) != damaged


def test_a_signal_after_everything_is_done_changes_nothing(tmp_path):
    trainer, sent = make_trainer(tmp_path, 2), []
    evaluate = trainer._evaluate

    def evaluate_and_send():
        evaluate()
        signal.raise_signal(signal.SIGTERM)
        sent.append(trainer.request.signal)

    trainer._evaluate = evaluate_and_send
    trainer.train()  # does not raise Stopped: the same command would have nothing to do
    assert sent == [signal.SIGTERM] and load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 2


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """As SIGHUP under nohup."""
    def loss(modules, batch, step):
        signal.raise_signal(signal.SIGHUP)
        return simple_loss(modules, batch, step)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = make_trainer(tmp_path, 2, loss=loss)
        trainer.train()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trainer.step == 2


def test_deterministic_algorithms_are_used_if_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    make_trainer(tmp_path, 1)
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        make_trainer(tmp_path, 1, train__deterministic=True).train()
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_seconds_add_up_over_starts_and_leave_out_evaluation(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    now = [0]

    def loss(modules, batch, step):
        now[0] += 1  # a step takes one second
        return simple_loss(modules, batch, step)

    def plot(modules, tick):
        now[0] += 1000
        return {"samples": torch.zeros(3, 4, 4, dtype=torch.uint8)}

    monkeypatch.setattr("utils.trainer.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    for max_steps in (3, 5, 9, 27):  # stops between two lines of metrics
        trainer = make_trainer(tmp_path, max_steps, loss=loss, plot=plot, train__plot_samples_steps=2,
                               train__plot_graph_steps=4)
        now[0] += 100  # preparations between the constructor and train()
        trainer.train()
    metrics = lines_of(tmp_path)
    assert [(line["step"], line["seconds"]) for line in metrics if "seconds" in line] == [
        (step, step) for step in range(4, 28, 4)]
    assert training_seconds(metrics) == 24 and seconds_per_step(metrics) == 1
    assert [message for message in caplog.messages if "about" in message] == ["about 0.1 more minutes for 6 steps"]


def test_an_interval_of_zero_switches_images_off(tmp_path):
    made = []
    options = {"plot": lambda modules, tick: made.append(1) or {}, "train__validate_steps": 2}
    make_trainer(tmp_path, 4, train__plot_samples_steps=0, **options).train()
    assert made == []
    make_trainer(tmp_path, 6, train__plot_samples_steps=10, **options).train()
    assert made == [1]
