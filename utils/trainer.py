"""The one training loop. It knows steps, optimisers, averages, files and progress, and no model."""

import functools
import logging
import time

import torch
from tqdm import tqdm

from utils import distributed, rng
from utils.checkpoint import CheckpointFolder, check_same_architecture, load_weights
from utils.config import run_dir, write_config
from utils.cores import warn_of_busy_cores
from utils.device import autocast, peak_memory_gb, resolve_dtype
from utils.errors import UserError
from utils.files import check_writable, remove_leftovers
from utils.logging import RunLog, evaluated
from utils.optimiser import EMA, Update
from utils.shutdown import Stopped, StopRequest, exit_code


class Trainer:
    """Trains `modules` until train.max_steps, from the newest checkpoint of the run if there is one.

    config      the whole config; sections run, train and optimizer act here
    kind        "autoencoder" or "latent": the first word of a checkpoint, and of its errors
    modules     nn.ModuleDict of all that is trained
    loss        (modules, batch, step) -> {"loss": scalar tensor, a mean over the batch, ...}; other entries are logged
    batches     first step -> iterator of this process's batches, train.accumulation_steps for every step
    validate    modules -> {name: float}; of the EMA and of the weights themselves, logged every validate_steps
    plot        (EMA modules, tick=) -> {name: uint8 image [C, H, W]}; saved every plot_samples_steps. It calls tick,
                which may raise, after every sampling step, or with the share of the images that the step was for
    plot_steps  sampling steps of plot
    state       {name: object with state_dict() and load_state_dict()}: what else a run needs to go on
    after_step  called after every update
    facts       plain data that those who load the checkpoint need (for example latent statistics); may be filled later
    source      text that identifies what is trained on; a checkpoint with another one is refused
    filename    name of the checkpoint in the run's folder
    best        name of a validation figure; the EMA weights with the smallest one are kept in best_<filename>

    A run that is killed at any instant and starts again with the same command gives the same files as one that was
    not: batches and random draws are functions of the step, all else is in the checkpoint.
    """

    def __init__(self, config, kind, modules, loss, batches, validate, plot, plot_steps, device,
                 state=None, after_step=lambda: None, facts=None, source="", filename="checkpoint.pt", best=None):
        self.config, self.kind, self.device = config, kind, device
        self.modules = modules.to(device).train()
        self.batches, self.validate, self.after_step = batches, validate, after_step
        self.plot, self.plot_steps = plot, plot_steps
        self.state, self.facts, self.source, self.best = state or {}, facts or {}, source, best
        self.folder = run_dir(config)
        self.checkpoints = CheckpointFolder(self.folder, filename, config.train.keep_checkpoints)
        self._check_folder()

        train = config.train
        self.dtype = resolve_dtype(train, device)
        self.ema = EMA(self.modules, train.ema_decay, train.ema_update_every)
        self.update = Update(config, self.modules, device, self.dtype)
        self.step, self.saved = 0, None  # saved: the step that the newest checkpoint holds, or soon will
        self.seconds, self.resumed = 0.0, None  # of training until `resumed`, a time; None: it does not go on now
        self.sums = {}  # sums of the metrics since the last log line, on the device: reading them would make it wait
        if self.checkpoints.exists():
            self._resume()
        if len(set(distributed.gather(torch.tensor([self.step])).tolist())) > 1:
            raise UserError(f"the processes do not find the same {self.checkpoints.newest}; put run.output_dir where "
                            "all machines can read it")
        self.loss = distributed.data_parallel(loss, self.modules)

    def _check_folder(self):
        check_writable(self.folder, f"run.output_dir={self.config.run.output_dir!r}")
        for path in sorted(self.folder.glob("*checkpoint.pt")):
            if path not in (self.checkpoints.newest, self.checkpoints.best):
                raise UserError(f"run.experiment={self.config.run.experiment!r} is a run of another kind, as {path} "
                                "tells, and they would overwrite each other's metrics; choose another")

    def _resume(self):
        if not self.config.train.load_checkpoint:
            raise UserError(f"{self.checkpoints.newest} exists and train.load_checkpoint=False would overwrite it; "
                            "set another run.experiment, or train.load_checkpoint=True to go on with it")
        saved, path = self.checkpoints.load(self.kind)
        check_same_architecture(saved["config"], self.config.to_dict(), path)
        if saved["source"] not in ("", self.source):  # empty: written before stage 1 recorded it
            what = f"{path} was trained on other data (the data set or the encoder has changed since)"
            if not self.config.train.allow_other_data:
                raise UserError(f"{what}; restore them, set another run.experiment, or insist with "
                                "train.allow_other_data=True")
            logging.warning("%s; the best checkpoint stays the one that the other held-out images chose", what)
        load_weights(self.modules, saved["modules"], path)
        load_weights(self.ema.modules, saved["ema"], path)
        self.update.load_state_dict(saved["update"])
        for name, part in self.state.items():
            part.load_state_dict(saved["state"][name])
        self.step, self.seconds = saved["step"], saved.get("seconds", 0.0)  # which older files lack
        self.saved = self.step if path == self.checkpoints.newest else None  # an older one, as the newest is damaged
        self.sums = {name: value.to(self.device) for name, value in saved["sums"].items()}

    def train(self):
        """Run to train.max_steps; log lines, checkpoints, validation and pictures come at their intervals and the end
        (pictures not where theirs is 0).

        Raises utils.shutdown.Stopped after saving where a signal asks to stop, FloatingPointError after a bad step (see
        utils.optimiser), OSError where a file cannot be written.
        """
        max_steps = self.config.train.max_steps
        if self.step >= max_steps and not distributed.any_rank(self._evaluation_is_due()):
            logging.info("%s is at step %d already; raise train.max_steps to go on", self.checkpoints.newest, self.step)
            return
        warn_of_busy_cores()
        if distributed.is_main():
            for folder in (self.folder, self.folder / "images"):
                remove_leftovers(folder)
            write_config(self.config, self.folder / "config.json")
        log = RunLog(self.folder, self.config, self.step)
        progress = tqdm(total=max_steps, initial=self.step, unit="step", desc=self.kind, smoothing=0.05,
                        disable=not distributed.is_main())
        try:
            with StopRequest() as request:
                self._run(log, progress, request)
        finally:
            self.checkpoints.wait()
            progress.close()
            log.close()

    def _run(self, log, progress, request):
        train = self.config.train
        batches = self.batches(self.step)
        self.resumed = time.monotonic()
        while True:
            stop = request.agreed()
            if not stop and self._evaluates():  # before the first step too: the run may have been killed meanwhile
                self.seconds, self.resumed = self._seconds(), None
                if self._evaluation_is_due():
                    self._evaluate(log, progress, request)
                stop = request.agreed()
                self.resumed = time.monotonic()
            if self.step >= train.max_steps and not distributed.any_rank(self._evaluation_is_due()):
                return
            if stop:
                self._stop(stop)
            self.training_step(batches)
            self.checkpoints.check()
            progress.update()
            if self.step % train.plot_graph_steps == 0:
                averages = self._averages()
                progress.set_postfix({name: f"{averages[name]:.4f}" for name in averages if name == "loss"})
                log.numbers(self.step, {**averages, "seconds": round(self._seconds(), 2),
                                        "peak_memory_gb": peak_memory_gb(self.device)})
            if self._due(train.checkpoint_steps):
                self.save()

    def _stop(self, stop):
        """Save, and raise Stopped for the signal on which all processes agree."""
        if self.saved != self.step:
            self.save()
        self.checkpoints.wait()
        distributed.barrier()  # or else torchrun would end the main process while it writes
        raise Stopped(f"stopped by {stop.name} after step {self.step}, saved in {self.checkpoints.newest}; "
                      "the same command goes on", exit_code(stop))

    def _seconds(self):
        """Of training, over all starts of the run, without validation and pictures."""
        return self.seconds + (0 if self.resumed is None else time.monotonic() - self.resumed)

    def _due(self, interval):
        return interval > 0 and (self.step % interval == 0 or self.step == self.config.train.max_steps)

    def training_step(self, batches):
        """One update from the next train.accumulation_steps batches of every process; its metrics are added to those
        since the last log line."""
        self.modules.train()
        count = self.config.train.accumulation_steps
        parts = []
        for part in range(count):
            with distributed.exchanged_later(self.loss, later=part + 1 < count):
                parts.append(self._backward(next(batches), distributed.rank() * count + part, count))
        metrics = {name: torch.stack([terms[name] for terms in parts]).mean() for name in parts[0]}
        metrics = distributed.mean(metrics)
        applied, norm = self.update.apply(self.step, metrics)
        self._accumulate({**metrics, "gradient_norm": norm}, applied)
        self.after_step()
        self.step += 1
        self.ema.update(self.step)

    def _backward(self, batch, part, count):
        """Add the gradients of one part of a step, of which each process has `count`. Returns its terms."""
        # Dropout is the only user of the global generator; seeded like this it does not depend on interruptions.
        torch.manual_seed(rng.seed_of(self.config.run.seed, self.kind, "dropout", self.step, part))
        with autocast(self.device, self.dtype):
            terms = self.loss(batch, self.step)
        self.update.backward(terms["loss"] / count)
        return {name: term.detach() for name, term in terms.items()}

    def save(self):
        """Write the checkpoint, unless a step since the last one was bad (FloatingPointError)."""
        self.update.settle()
        self.saved = self.step
        if distributed.is_main():
            self.checkpoints.save({
                **self._header(), "modules": self.modules.state_dict(), "ema": self.ema.modules.state_dict(),
                "update": self.update.state_dict(), "sums": self.sums, "seconds": self._seconds(),
                "state": {name: part.state_dict() for name, part in self.state.items()},
            })

    def _header(self):
        return {"kind": self.kind, "step": self.step, "config": self.config.to_dict(), "facts": self.facts,
                "source": self.source}

    def _evaluates(self):
        """Whether validation or pictures come at this step."""
        train = self.config.train
        return self.step > 0 and (self._due(train.validate_steps) or self._due(train.plot_samples_steps))

    def _evaluation_is_due(self):
        """Whether they are this process's to make, and not there from a run that stopped later. They are the main
        process's; the others wait for it where all agree whether to stop."""
        return self._evaluates() and distributed.is_main() and not evaluated(self.folder, self.step)

    def _evaluate(self, log, progress, request):
        """Validation and pictures, as they are due. The line about them is the last thing: it tells a run that starts
        again that they are done. Pictures can take longer than a scheduler waits, so a request to stop ends them."""
        train, figures = self.config.train, {}
        if self._due(train.validate_steps):
            progress.set_description(f"{self.kind}, validating")
            figures = self._validate(log)
        if self._due(train.plot_samples_steps):
            try:
                pictures = self._pictures(progress, request)
            except _Abandoned:
                return
            for name, image in pictures.items():
                log.picture(self.step, name, image)
            figures["pictures"] = len(pictures)
        progress.set_description(self.kind)
        self.checkpoints.wait()  # the line about a best state must not be there before it is
        log.numbers(self.step, figures)

    def _pictures(self, progress, request):
        """What plot makes of the EMA weights; _Abandoned at the next sampling step where a signal has come."""
        done = 0

        def tick(share=1):
            nonlocal done
            if request.signal:
                raise _Abandoned
            done += share
            progress.set_description(f"{self.kind}, making pictures, {done:.0f} of {self.plot_steps} sampling steps",
                                     refresh=round(done) % 10 == 0)

        tick(0)
        return self._call(functools.partial(self.plot, tick=tick), self.ema.modules)

    def _validate(self, log):
        """Figures of the EMA weights, and under raw_<name> of the weights themselves; the best EMA weights are kept."""
        figures = self._call(self.validate, self.ema.modules)
        if self.best and (figures[self.best] < log.smallest(self.best) or not self.checkpoints.best.exists()):
            self.checkpoints.save_best({**self._header(), "ema": self.ema.modules.state_dict(),
                                        "value": figures[self.best]})
        raw = self._call(self.validate, self.modules.eval())
        return {**figures, **{f"raw_{name}": value for name, value in raw.items()}}

    def _call(self, function, modules):
        with torch.no_grad(), autocast(self.device, self.dtype):
            return function(modules)

    def _accumulate(self, metrics, applied):
        """Add to the sums, unless the step was left out: its loss may be no number."""
        for name, value in {**metrics, "steps": torch.ones((), device=self.device)}.items():
            self.sums[name] = self.sums.get(name, 0) + torch.where(applied, value.detach().float(), 0)

    def _averages(self):
        """Averages since the last log line over the steps that were not left out; how many were, since the start."""
        self.update.settle()
        steps = self.sums.pop("steps")
        averages = {name: (value / steps).item() for name, value in self.sums.items()} if steps else {}
        self.sums = {}
        if self.config.optimizer.gradient_skip:
            averages["skipped"] = self.update.skipped
        if self.config.train.nonfinite == "skip":
            averages["nonfinite"] = self.update.nonfinite
        return averages


class _Abandoned(Exception):
    """Pictures were left unfinished, because the run was asked to stop."""
