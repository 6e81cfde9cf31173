"""The training loop on a problem with a known answer: resuming, averaging, skipping, stopping."""

import itertools
import math
import re
import signal
import threading
import time
import types

import pytest
import torch
from torch import nn

from models.build import build_decoder, build_encoder
from tests.tiny import tiny_config
from utils import checkpoint as checkpoint_folder
from utils import rng
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.logging import RunLog, read_metrics, seconds_per_step, training_seconds
from utils.optimiser import learning_rate
from utils.shutdown import Stopped
from utils.trainer import Trainer


class Counter:
    """A part with state, which changes the loss: forgetting it on resuming would show."""

    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def make_trainer(tmp_path, max_steps, loss=None, best=None, validate=None, plot=None, experiment="run", **overrides):
    config = tiny_config(tmp_path)
    config.run.experiment = experiment
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

    def batches(start):
        for step in itertools.count(start):
            yield rng.randn((5, 3), rng.generator("cpu", "batch", step))

    return Trainer(config, "autoencoder", modules, loss or regression, batches, validate or (lambda ema: {"v": 1.0}),
                   plot or (lambda ema, tick: {}), 0, torch.device("cpu"), state={"counter": counter}, best=best)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_busy_cores_are_looked_for_once_there_is_something_to_do(tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr("utils.trainer.warn_of_busy_cores", lambda: looks.append(1))
    trainer = make_trainer(tmp_path, 1)
    assert not looks  # a mistake may still be found
    trainer.train()
    assert len(looks) == 1
    trainer.train()
    assert len(looks) == 1


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_stopped_run_goes_on_to_the_same_checkpoint(tmp_path, stop):
    make_trainer(tmp_path / "whole", 7).train()
    make_trainer(tmp_path / "parts", stop).train()
    make_trainer(tmp_path / "parts", 7).train()
    whole, parts = (load_checkpoint(tmp_path / name / "run" / "checkpoint.pt") for name in ("whole", "parts"))
    for name in set(whole) - {"config", "seconds"}:
        assert equal(whole[name], parts[name]), name
    losses = [[(line["step"], line["loss"]) for line in read_metrics(tmp_path / name / "run" / "metrics.jsonl")
               if "loss" in line] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [2, 4, 6]


def test_lines_after_the_checkpoint_are_written_again_not_twice(tmp_path):
    make_trainer(tmp_path, 4).train()
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "loss": 123.0}\n{"step": 7, "lo')
    make_trainer(tmp_path, 6).train()
    steps = [line["step"] for line in read_metrics(path) if "loss" in line]
    assert steps == [2, 4, 6] and "123.0" not in path.read_text()


def test_it_learns_and_the_average_follows(tmp_path):
    trainer = make_trainer(tmp_path, 400, optimizer__learning_rate=1e-2)
    start = trainer.ema.modules.state_dict()
    assert equal(start, trainer.modules.state_dict())
    trainer.train()
    lines = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    per_step = [loss / (1 + 0.1 * (2 * i + 1)) for i, loss in enumerate(lines)]
    assert sum(per_step[-20:]) < 0.3 * sum(per_step[:20])
    x = torch.eye(3)
    torch.testing.assert_close(trainer.ema.modules["net"](x), trainer.modules.eval()["net"](x), atol=0.2, rtol=0.2)


def test_a_finished_run_is_left_as_it_is(tmp_path, caplog):
    make_trainer(tmp_path, 2).train()
    before = (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, 2).train()
    assert "at step 2 already" in caplog.text
    assert (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns == before


def test_options_of_the_optimiser_come_from_the_config_after_resuming(tmp_path):
    make_trainer(tmp_path, 2).train()
    trainer = make_trainer(tmp_path, 4, optimizer__adam_beta1=0.5)
    assert trainer.update.optimizer.param_groups[0]["betas"] == (0.5, 0.99)
    assert trainer.update.optimizer.state  # the moments did come from the checkpoint


def test_other_data_is_refused(tmp_path):
    make_trainer(tmp_path, 2).train()
    path = tmp_path / "run" / "checkpoint.pt"
    save_checkpoint(path, {**load_checkpoint(path), "source": "other latents"})
    with pytest.raises(UserError, match="trained on other data"):
        make_trainer(tmp_path, 4)


def test_a_gradient_that_is_not_finite_is_not_saved(tmp_path):
    def kink(modules, batch, step):
        error = modules["net"](batch).mean()
        return {"loss": (error - error.detach()).abs().sqrt() if step == 3 else error}  # 0, but its slope is infinite

    make_trainer(tmp_path, 2).train()
    with pytest.raises(FloatingPointError, match="not finite in step 3, samples 12 to 15: gradient of net.0.weight = "):
        make_trainer(tmp_path, 4, loss=kink).train()
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 2


def die(*_, **__):
    raise KeyboardInterrupt


def test_no_overwriting_without_leave(tmp_path):
    make_trainer(tmp_path, 2).train()
    with pytest.raises(UserError, match="train.load_checkpoint=False would overwrite"):
        make_trainer(tmp_path, 4, train__load_checkpoint=False)


def test_another_architecture_is_named(tmp_path):
    make_trainer(tmp_path, 2).train()
    with pytest.raises(UserError, match="model.nf=8, the config has 16"):
        make_trainer(tmp_path, 4, model__nf=16)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, bad):
    make_trainer(tmp_path, 2).train()

    def broken(modules, batch, step):
        return {"loss": modules["net"](batch).sum() * (bad if step == 3 else 1.0)}

    with pytest.raises(FloatingPointError, match="step 3, samples 12 to 15: loss term loss = -?(nan|inf);"):
        make_trainer(tmp_path, 8, loss=broken).train()
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert saved["step"] == 2
    assert all(torch.isfinite(value).all() for value in saved["modules"].values())


def test_gradient_skip_leaves_out_large_gradients(tmp_path):
    def rough(modules, batch, step):
        return {"loss": modules["net"](batch).square().mean() * {1: 1e9}.get(step, 1.0)}

    trainer = make_trainer(tmp_path, 8, loss=rough, optimizer__gradient_skip=True,
                           optimizer__gradient_skip_threshold=1e4)
    trainer.train()
    assert trainer.update.skipped == 1 and trainer.update.nonfinite == 0
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["update"]["skipped"] == 1


def test_gradients_are_clipped_to_the_norm(tmp_path):
    def steep(modules, batch, step):
        return {"loss": 1e6 * modules["net"](batch).mean()}

    def moved(limit):
        trainer = make_trainer(tmp_path / str(limit), 1, loss=steep, optimizer__clip_gradient_norm=limit)
        norms = []
        trainer.update.optimizer.register_step_post_hook(lambda optimizer, *_: norms.append(torch.cat(
            [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]).norm().item()))
        trainer.train()
        return norms[0]

    assert moved(1.0) == pytest.approx(1.0, rel=1e-3)
    assert moved(0.0) > 1e4  # 0 turns clipping off


def test_warm_up_scales_the_first_steps(tmp_path):
    trainer = make_trainer(tmp_path, 6, optimizer__warmup_steps=4, optimizer__learning_rate=0.1)
    rates = []
    trainer.update.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    trainer.train()
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_the_best_average_is_kept(tmp_path):
    figures = iter([math.nan, 0.1, 1.0, 0.1, 2.0, 0.1])  # of the average and of the weights themselves, in turn
    trainer = make_trainer(tmp_path, 6, best="v", validate=lambda modules: {"v": next(figures)})
    trainer.train()
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
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1] == {"step": 2, "v": 1.0, "raw_v": 2.0, "pictures": 0}
    trainer.training_step(trainer.batches(2))
    assert trainer.modules.training


def test_the_line_about_a_best_state_comes_when_it_is_on_the_disk(tmp_path, monkeypatch):
    save, numbers, seen = checkpoint_folder.save_checkpoint, RunLog.numbers, []
    best = tmp_path / "run" / "best_checkpoint.pt"

    def slow(*arguments):
        time.sleep(0.05)
        save(*arguments)

    def watched(log, step, values):
        if "v" in values:
            seen.append((step, best.exists() and load_checkpoint(best)["step"]))
        numbers(log, step, values)

    monkeypatch.setattr(checkpoint_folder, "save_checkpoint", slow)
    monkeypatch.setattr(RunLog, "numbers", watched)
    figures = iter([2.0, 0.0, 1.0, 0.0])
    make_trainer(tmp_path, 4, best="v", validate=lambda modules: {"v": next(figures)}).train()
    assert seen == [(2, 2), (4, 4)]


def test_validation_and_pictures_go_on_while_the_best_state_is_written(tmp_path, monkeypatch):
    done, waited = threading.Event(), []

    def slow(path, state, displaced=None):
        if path.name == "best_checkpoint.pt":
            waited.append(done.wait(10))
        save_checkpoint(path, state, displaced)

    monkeypatch.setattr(checkpoint_folder, "save_checkpoint", slow)
    trainer = make_trainer(tmp_path, 2, best="v", train__plot_samples_steps=2)
    trainer.plot = lambda modules, tick: done.set() or {}
    trainer.train()
    assert waited == [True]


def test_a_checkpoint_that_cannot_be_written_stops_the_run_in_the_next_step(tmp_path, monkeypatch):
    def full(path, state, displaced=None):
        if state["step"] == 4:
            raise OSError(f"{path} could not be written (No space left on device)")
        save_checkpoint(path, state, displaced)

    monkeypatch.setattr(checkpoint_folder, "save_checkpoint", full)
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


def test_what_killed_writers_left_is_removed(tmp_path):
    make_trainer(tmp_path, 2).train()
    before = sorted(tmp_path.rglob("*"))
    for name in ("run/.checkpoint.pt.123.tmp", "run/.metrics.jsonl.9.tmp", "run/images/.samples_0000002.png.5.tmp"):
        (tmp_path / name).write_text("half")
    make_trainer(tmp_path, 3).train()
    assert [path for path in sorted(tmp_path.rglob("*")) if path.suffix == ".tmp"] == []
    assert set(before) < set(tmp_path.rglob("*"))


@pytest.mark.parametrize("where", ["validate", "plot"])
def test_a_run_killed_while_it_evaluates_has_saved_its_steps_and_does_that_first_when_it_goes_on(tmp_path, where):
    calls = []

    def figures(modules):
        calls.append("validate")
        return {"v": 2.0 - len(calls)}

    options = {"best": "v", "train__validate_steps": 3}
    trainer = make_trainer(tmp_path, 3, validate=figures, **options)
    setattr(trainer, where, die)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 3
    calls.clear()
    trainer = make_trainer(tmp_path, 3, validate=figures, **options)
    trainer.training_step = die
    trainer.train()
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "v" in line] == [3]
    assert load_checkpoint(tmp_path / "run" / "best_checkpoint.pt")["step"] == 3
    make_trainer(tmp_path, 3, validate=die, **options).train()  # now it is finished


def test_names_on_disk_are_those_of_the_networks_also_when_they_are_compiled(tmp_path):
    names = []
    for compiled in (False, True):
        trainer = make_trainer(tmp_path / str(compiled), 1)
        config = tiny_config(tmp_path)
        config.train.compile = compiled
        trainer.modules = nn.ModuleDict({"encoder": build_encoder(config), "decoder": build_decoder(config)})
        trainer.save()
        trainer.checkpoints.wait()
        names.append(list(load_checkpoint(tmp_path / str(compiled) / "run" / "checkpoint.pt")["modules"]))
    assert names[0] == names[1] and "decoder.linear_out.weight" in names[0]
    assert not any(part in ("module", "_orig_mod") for name in names[1] for part in name.split("."))


def test_cosine_decay_goes_from_the_full_rate_to_zero():
    config = tiny_config(".")
    config.optimizer.learning_rate, config.optimizer.decay, config.train.max_steps = 0.1, "cosine", 100
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 50) == pytest.approx(0.05)
    assert learning_rate(config, 99) < 1e-4
    config.optimizer.decay = "none"
    assert learning_rate(config, 99) == pytest.approx(0.1)


@pytest.mark.parametrize("amp, precision, expected", [(False, "bf16", torch.float32), (True, "bf16", torch.bfloat16),
                                                      (True, "fp32", torch.float32)])
def test_precision_reaches_the_network(tmp_path, amp, precision, expected):
    seen = []

    def loss(modules, batch, step):
        seen.append(modules["net"](batch).dtype)
        return {"loss": modules["net"](batch).square().mean()}

    make_trainer(tmp_path, 1, loss=loss, train__amp=amp, train__precision=precision).train()
    assert seen == [expected]


def test_fp16_on_a_cpu_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="train.precision='fp16' needs a GPU"):
        make_trainer(tmp_path, 1, train__precision="fp16")


@pytest.mark.parametrize("max_steps", [2, 4])
def test_a_signal_ends_the_pictures_and_the_same_command_makes_them(tmp_path, max_steps):
    """At step 2, which is the last one or is not."""
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
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "v" in line] == steps


def test_a_signal_in_a_step_comes_before_the_evaluation_of_that_step(tmp_path):
    validated = []

    def loss(modules, batch, step):
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return {"loss": modules["net"](batch).square().mean()}

    def validate(modules):
        validated.append(trainer.step)
        return {"v": 1.0}

    trainer = make_trainer(tmp_path, 4, loss=loss, validate=validate)
    with pytest.raises(Stopped, match="after step 2"):
        trainer.train()
    assert validated == []
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
    trainer = make_trainer(tmp_path, 8, train__keep_checkpoints=2)
    trainer.batches = lambda start: signal.raise_signal(signal.SIGTERM)
    step = 2 if damaged else 4
    with pytest.raises(Stopped, match=f"after step {step}, saved in {path}"):
        trainer.train()
    assert load_checkpoint(path)["step"] == step
    assert (path.stat().st_mtime_ns == before) != damaged


def test_a_signal_after_all_is_done_changes_nothing(tmp_path):
    trainer, sent = make_trainer(tmp_path, 2), []
    evaluate = trainer._evaluate

    def evaluate_and_send(log, progress, request):
        evaluate(log, progress, request)
        signal.raise_signal(signal.SIGTERM)
        sent.append(request.signal)

    trainer._evaluate = evaluate_and_send
    trainer.train()  # does not raise Stopped: the same command would have nothing to do
    assert sent == [signal.SIGTERM] and load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 2


def test_seconds_go_on_over_starts_and_leave_out_validation_and_pictures(tmp_path, monkeypatch):
    now = [0]

    def loss(modules, batch, step):
        now[0] += 1  # a step takes one second
        return {"loss": modules["net"](batch).square().mean()}

    def plot(modules, tick):
        now[0] += 1000
        return {"samples": torch.zeros(3, 4, 4, dtype=torch.uint8)}

    monkeypatch.setattr("utils.trainer.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    for max_steps in (3, 5, 9):  # and the run stops between two lines of metrics
        options = {"loss": loss, "plot": plot, "train__plot_samples_steps": 2, "train__plot_graph_steps": 4}
        make_trainer(tmp_path, max_steps, **options).train()
        now[0] += 100
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(line["step"], line["seconds"]) for line in metrics if "seconds" in line] == [(4, 4), (8, 8)]
    assert training_seconds(metrics) == 8 and seconds_per_step(metrics) == 1


def test_the_bar_counts_sampling_steps_also_where_each_is_for_a_part_of_the_images(tmp_path, capsys):
    def plot(modules, tick):
        for _ in range(40):
            tick(0.5)
        return {}

    trainer = make_trainer(tmp_path, 2, plot=plot, train__plot_samples_steps=2)
    trainer.plot_steps = 20
    trainer.train()
    assert re.findall(r"making pictures, (\d+) of 20 sampling steps", capsys.readouterr().err)[-1] == "20"


def test_no_pictures_are_made_where_their_interval_is_zero(tmp_path):
    made = []
    options = {"plot": lambda modules, tick: made.append(1) or {}, "train__validate_steps": 2}
    make_trainer(tmp_path, 4, train__plot_samples_steps=0, **options).train()
    assert made == []
    make_trainer(tmp_path, 6, train__plot_samples_steps=10, **options).train()
    assert made == [1]
