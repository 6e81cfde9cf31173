"""The training loop of both stages. It knows steps, optimiser, checkpoints and logs, and nothing about the model."""

import functools
import logging
import time

import torch
from tqdm import tqdm

from utils import distributed, rng
from utils.checkpoint import CheckpointFolder, check_same_architecture, load_weights, to_host
from utils.config import changed_fields, run_dir
from utils.device import (
    autocast,
    in_training,
    peak_memory_gb,
    resolve_compile,
    resolve_dtype,
    use_deterministic_algorithms,
)
from utils.errors import UserError
from utils.files import check_writable, remove_leftovers, try_lock, write_json
from utils.logging import RunLog, evaluated, read_metrics
from utils.optimiser import EMA, Optimiser
from utils.shutdown import Stopped, StopRequest, exit_code


class Trainer:
    """Trains `modules`, on one or several ranks, with resuming, evaluation and graceful shutdown.

    config      the whole config; sections run, train and optimizer act here
    kind        "autoencoder" or "latent", recorded in the checkpoint
    modules     nn.ModuleDict of everything that is trained
    loss        (networks, batch, step) -> {"loss": scalar mean over the batch, ...}; further scalars are logged.
                networks holds functions, utils.device.in_training of each entry of modules
    state       {name: object with state_dict() and load_state_dict()} that the checkpoint must hold as well
    after_step  called after every step
    facts       plain data for readers of the checkpoint, for example latent statistics; may be filled until train()
    source      identifies the training data; a checkpoint with another source is refused
    filename    name of the checkpoint in the run folder
    best        name of a validation figure; the EMA weights with its smallest value go to best_<filename>
    best_from   first step whose figures are compared; before it, while the loss still changes, the newest are the best

    A script calls train(). A benchmark needs only the constructor and training_step(): neither reads nor writes a file.

    A run that is killed and restarted with the same command produces bit-identical weights and metrics on a CPU:
    batches and random draws are functions of the step, and the checkpoint holds everything else. On a GPU the gradients
    of cuDNN's convolutions and of flash attention use atomic additions, whose order varies from run to run;
    train.deterministic=True selects PyTorch's deterministic algorithms instead.
    """

    def __init__(self, config, kind, modules, loss, device, state=None, after_step=lambda: None, facts=None, source="",
                 filename="checkpoint.pt", best=None, best_from=0):
        train = config.train
        self.config, self.kind, self.device = config, kind, device
        if train.deterministic:
            use_deterministic_algorithms()
        self.modules = modules.to(device).train()
        self.state, self.after_step = state or {}, after_step
        self.facts, self.source, self.best, self.best_from = facts or {}, source, best, best_from
        self.folder = run_dir(config)
        self.checkpoints = CheckpointFolder(self.folder, filename, train.keep_checkpoints)
        self.dtype, compiled = resolve_dtype(train, device), resolve_compile(train, device)
        if compiled:
            logging.info("compiling the networks, for minutes at the first step (train.compile=%s)", train.compile)
        networks = {name: in_training(network, self.dtype, compiled) for name, network in self.modules.items()}
        self.loss = distributed.data_parallel(functools.partial(loss, networks), self.modules)
        self.ema = EMA(self.modules, train.ema_decay, train.ema_update_every)
        self.optimiser = Optimiser(config, self.modules, device, self.dtype)
        self.step = 0
        self.saved = None  # the step in the newest checkpoint, written or being written
        self.seconds = 0.0  # of training in earlier starts of the run
        self.start = time.monotonic()  # of training, minus those seconds, moved forward by the time of evaluation
        self.sums = {}  # of metrics since the last log line; on the device, because reading them waits for it
        self.resumed, self.lock = False, None

    def resume(self):
        """Lock the run folder and load the newest checkpoint, if there is one. train() does so itself; a script calls
        it earlier to fail before long preparations. UserError if the run cannot be continued with this config, or if
        another process is training it."""
        self.resumed = True
        check_writable(self.folder, f"run.output_dir={self.config.run.output_dir!r}")
        self._lock_folder(only_existing=True)  # a command that is refused leaves nothing behind
        self._check_folder()
        if self.checkpoints.exists():
            self._load()
        self._lock_folder()
        if len(set(distributed.gather(torch.tensor([self.step])).tolist())) > 1:
            raise UserError(f"the ranks do not find the same {self.checkpoints.newest}; set run.output_dir to a folder "
                            "that all machines share")

    def _lock_folder(self, only_existing=False):
        """UserError if another process is training in the run folder. The main rank locks it for all."""
        path = self.folder / ".lock"

        def holder():
            if self.lock is None and (path.exists() or not only_existing):
                path.parent.mkdir(parents=True, exist_ok=True)
                self.lock = try_lock(path)
                return path.read_text(encoding="utf-8") if self.lock is None else ""
            return ""

        other = distributed.from_main(holder)
        if other:
            raise UserError(f"run.experiment={self.config.run.experiment!r} is being trained by another process in "
                            f"{self.folder} ({other}); wait for it, stop it, or choose another run.experiment")

    def _check_folder(self):
        for path in sorted(self.folder.glob("*checkpoint.pt")):
            if path not in (self.checkpoints.newest, self.checkpoints.best):
                raise UserError(f"run.experiment={self.config.run.experiment!r} is a run of another kind, which has "
                                f"left {path}; choose another")
        if self.checkpoints.exists() and not self.config.train.load_checkpoint:
            raise UserError(f"{self.checkpoints.newest} exists and train.load_checkpoint=False would overwrite it; "
                            "set another run.experiment, or train.load_checkpoint=True to continue the run")
        read_metrics(self.folder / "metrics.jsonl")  # raises if a line is not readable

    def _load(self):
        saved, path = self.checkpoints.load(self.kind)
        check_same_architecture(saved["config"], self.config.to_dict(), path)
        if saved["source"] != self.source:
            what = f"{path} was trained on other data (the data set or the encoder has changed since)"
            if not self.config.train.allow_other_data:
                raise UserError(f"{what}; restore them, set another run.experiment, or insist with "
                                "train.allow_other_data=True")
            logging.warning("%s; the best checkpoint stays the one that the other held-out images chose", what)
        load_weights(self.modules, saved["modules"], path)
        load_weights(self.ema.modules, saved["ema"], path)
        self.optimiser.load_state_dict(saved["optimiser"])
        for name, part in self.state.items():
            part.load_state_dict(to_host(saved["state"][name]))  # copied, so that nothing keeps the file mapped
        self.step = saved["step"]
        self.saved = self.step if path == self.checkpoints.newest else None  # an older file if the newest is damaged
        self.seconds = saved["seconds"]
        self.sums = {name: value.to(self.device, copy=True) for name, value in saved["sums"].items()}
        logging.info("continuing %s from step %d", path, self.step)
        for name, now, before in changed_fields(saved["config"], self.config):
            logging.info("changed since then: %s %r -> %r", name, before, now)

    def train(self, batches, validate, plot, plot_steps):
        """Train to train.max_steps. Log lines, checkpoints, validation and images come at their intervals and at the
        end; an interval of 0 switches images off.

        batches     first step -> iterator over this rank's batches, train.accumulation_steps per step
        validate    modules -> {name: float}; called with the EMA and with the raw weights
        plot        (EMA modules, tick) -> {name: uint8 image [C, H, W]}. It calls tick() after each sampling step, or
                    tick(share) if the step covered a share of the images; tick may raise
        plot_steps  number of sampling steps of plot
        Raises utils.shutdown.Stopped after saving if a signal asked to stop, FloatingPointError after a bad step (see
        utils.optimiser) and OSError if a file cannot be written.
        """
        self.validate, self.plot, self.plot_steps = validate, plot, plot_steps
        if not self.resumed:
            self.resume()
        try:
            self._train(batches)
        finally:
            self.lock and self.lock.close()

    def _train(self, batches):
        max_steps = self.config.train.max_steps
        if self.step >= max_steps and not distributed.any_rank(self._must_evaluate()):
            logging.info("%s is at step %d already; raise train.max_steps to continue", self.checkpoints.newest,
                         self.step)
            return
        if distributed.is_main():
            for folder in (self.folder, self.folder / "images"):
                remove_leftovers(folder)
            write_json(self.folder / "config.json", self.config.to_dict())
        self.log = RunLog(self.folder, self.config, self.step)
        self.progress = tqdm(total=max_steps, initial=self.step, unit="step", desc=self.kind, smoothing=0.05,
                             disable=not distributed.is_main())
        try:
            with StopRequest() as self.request:
                self._run(batches(self.step))
        finally:
            self.checkpoints.wait()
            self.progress.close()
            self.log.close()

    def _run(self, batches):
        train = self.config.train
        self.start = time.monotonic() - self.seconds
        first = self.step
        while True:
            stop = self.request.agreed()
            if not stop and self._evaluates():  # also before the first step: the run may have been killed at this one
                if self._must_evaluate():
                    began = time.monotonic()
                    self._evaluate()
                    self.start += time.monotonic() - began
                stop = self.request.agreed()
            if self.step >= train.max_steps and not distributed.any_rank(self._must_evaluate()):
                return
            if stop:
                self._stop(stop)
            self.training_step(batches)
            self.checkpoints.check()
            self.progress.update()
            if self.step == first + 2:  # the first step compiles
                compiled = time.monotonic() - self.start
            elif self.step == first + 12:
                minutes = (time.monotonic() - self.start - compiled) / 10 * (train.max_steps - self.step) / 60
                logging.info("about %.1f more minutes for %d steps", minutes, train.max_steps - self.step)
            if self.step % train.plot_graph_steps == 0:
                averages = self._averages()
                self.progress.set_postfix({name: f"{averages[name]:.4f}" for name in averages if name == "loss"})
                self.log.numbers(self.step, {**averages, "seconds": round(time.monotonic() - self.start, 2),
                                             "peak_memory_gb": peak_memory_gb(self.device)})
            if self._due(train.checkpoint_steps):
                self.save()

    def _stop(self, stop):
        """Save, and raise Stopped for the signal that all ranks agree on."""
        if self.saved != self.step:
            self.save()
        self.checkpoints.wait()
        distributed.barrier()  # torchrun kills the main process when another rank ends first
        raise Stopped(f"stopped by {stop.name} after step {self.step}, saved in {self.checkpoints.newest}; "
                      "the same command continues", exit_code(stop))

    def training_step(self, batches):
        """One optimiser step on the next train.accumulation_steps batches of the iterator `batches`. Adds its metrics
        to self.sums, tensors on the device."""
        self.modules.train()
        count = self.config.train.accumulation_steps
        parts = []
        for part in range(count):
            with distributed.no_sync(self.loss, part + 1 < count):
                parts.append(self._backward(next(batches), distributed.rank() * count + part, count))
        metrics = {name: torch.stack([terms[name] for terms in parts]).mean() for name in parts[0]}
        metrics = distributed.mean(metrics)
        applied, norm = self.optimiser.apply(self.step, metrics)
        for name, value in {**metrics, "gradient_norm": norm, "steps": torch.ones_like(norm)}.items():
            self.sums[name] = self.sums.get(name, 0) + torch.where(applied, value.float(), 0)
        self.after_step()
        self.step += 1
        self.ema.update(self.step)

    def _backward(self, batch, part, count):
        """Accumulate the gradients of micro-batch `part` of the step. Returns its terms."""
        # Dropout alone uses the global generator. This seed makes it a function of the step and the micro-batch.
        torch.manual_seed(rng.seed_of(self.config.run.seed, self.kind, "dropout", self.step, part))
        with autocast(self.device, self.dtype):
            terms = self.loss(batch, self.step)
        self.optimiser.backward(terms["loss"] / count)
        return {name: term.detach() for name, term in terms.items()}

    def save(self):
        """Start to write the checkpoint. FloatingPointError if a step since the last one was bad."""
        self.optimiser.settle()
        self.saved = self.step
        if distributed.is_main():
            self.checkpoints.save({
                **self._header(), "modules": self.modules.state_dict(), "ema": self.ema.modules.state_dict(),
                "optimiser": self.optimiser.state_dict(), "sums": self.sums, "seconds": time.monotonic() - self.start,
                "state": {name: part.state_dict() for name, part in self.state.items()},
            })

    def _header(self):
        return {"kind": self.kind, "step": self.step, "config": self.config.to_dict(), "facts": self.facts,
                "source": self.source}

    def _due(self, interval):
        return interval > 0 and (self.step % interval == 0 or self.step == self.config.train.max_steps)

    def _evaluates(self):
        """True if validation or images belong to this step."""
        train = self.config.train
        return self.step > 0 and (self._due(train.validate_steps) or self._due(train.plot_samples_steps))

    def _must_evaluate(self):
        """True if this rank must run an evaluation that is not in the log yet. Only the main rank evaluates; the others
        wait for it when all agree on whether to stop."""
        return self._evaluates() and distributed.is_main() and not evaluated(self.folder, self.step)

    def _evaluate(self):
        """Validation and images, as due. Their log line comes last: it tells a restarted run that they are done. A
        request to stop interrupts sampling, which can take longer than a scheduler waits."""
        train, figures = self.config.train, {}
        try:
            if self._due(train.validate_steps):
                self.progress.set_description(f"{self.kind}, validating")
                figures = self._validate()
            if self._due(train.plot_samples_steps):
                images = self._call(functools.partial(self.plot, tick=self._tick()), self.ema.modules)
                for name, image in images.items():
                    self.log.picture(self.step, name, image)
                figures["pictures"] = len(images)
        except _Interrupted:
            return
        self.progress.set_description(self.kind)
        self.checkpoints.wait()  # the best checkpoint must be on disk before its line is in the log
        self.log.numbers(self.step, figures)

    def _tick(self):
        """Callback for plot: counts sampling steps, and raises _Interrupted once a signal has arrived."""
        done = 0

        def tick(share=1):
            nonlocal done
            if self.request.signal:
                raise _Interrupted
            done += share
            self.progress.set_description(f"{self.kind}, sampling images, step {done:.0f} of {self.plot_steps}",
                                          refresh=round(done) % 10 == 0)

        tick(0)
        return tick

    def _validate(self):
        """Figures of the EMA weights and, as raw_<name>, of the raw weights. Keeps the best EMA weights."""
        figures = self._call(self.validate, self.ema.modules)
        if self.best and (figures[self.best] < self.log.smallest(self.best, self.best_from)
                          or self.step < self.best_from or not self.checkpoints.best.exists()):
            self.checkpoints.save_best({**self._header(), "ema": self.ema.modules.state_dict(),
                                        "value": figures[self.best]})
        raw = self._call(self.validate, self.modules.eval())
        return {**figures, **{f"raw_{name}": value for name, value in raw.items()}}

    def _call(self, function, modules):
        with torch.no_grad(), autocast(self.device, self.dtype):
            return function(modules)

    def _averages(self):
        """Metrics averaged over the steps applied since the last log line, and the numbers of skipped steps so far."""
        self.optimiser.settle()
        steps = self.sums.pop("steps")
        averages = {name: (value / steps).item() for name, value in self.sums.items()} if steps else {}
        self.sums = {}
        if self.config.optimizer.gradient_skip:
            averages["skipped"] = self.optimiser.skipped
        if self.config.train.nonfinite == "skip":
            averages["nonfinite"] = self.optimiser.nonfinite
        return averages


class _Interrupted(Exception):
    """Sampling was left unfinished because the run was asked to stop."""
