"""A training run in a folder: steps, evaluations, log, checkpoints and exact resume, for every model."""

import math
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama.checkpoints import open_weights, save
from lama.data.tokens import Progress
from lama.errors import LamaError, note
from lama.files import field as field_of
from lama.files import read_object
from lama.models.registry import n_parameters
from lama.runtime.buffers import write
from lama.training.folder import RunFolder, restore, step_of
from lama.training.launched import launch_options, tell_launcher
from lama.training.lines import Record
from lama.training.loop import Diverged, Step, Trainer
from lama.training.processes import Processes, memory_of
from lama.training.settings.base import GROUPS

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of the model on the held-out data after `step` updates."""

    step: int
    metrics: Mapping[str, float]
    """`validation_loss`, in nats, and others that depend on the model."""
    best: bool
    """Whether no evaluation of this run was better."""

    @property
    def validation_loss(self) -> float:
        """Nats per token, or per text of a classifier."""
        return self.metrics["validation_loss"]


@dataclass
class Parts:
    """The parts of a session that every model has."""

    folder: RunFolder
    config: Any
    """The settings of the model's class."""
    devices: Sequence[str] = ()
    about: Mapping[str, object] = field(default_factory=dict)
    """The model's origin, for its config.json."""
    progress: Progress = iter
    team: Processes | None = None
    model: Any = None
    tokenizer: Any = None


class Session:
    """Iterate over it for a `Step` after each update and, when one is due, an `Evaluation`.

    A subclass has the data, the evaluation and a trainer for each stage; steps are counted over all stages. A
    resumed session gives the same bits as an uninterrupted one.
    """

    keeps_best = True
    """Whether the folder keeps the best model of all evaluations instead of the last."""

    def __init__(self, parts: Parts, digest: str):
        """`digest` identifies the data."""
        self.folder, self.config, self.about = parts.folder, parts.config, dict(parts.about)
        self.model, self.tokenizer = parts.model, parts.tokenizer
        self.digest, self.devices, self.team = digest, parts.devices, parts.team
        self.trainers: list[Trainer] = []
        """One for each stage."""
        self.best = math.inf
        """The lowest `rank` of all evaluations."""
        self.evaluated = 0
        """The step of the last evaluation."""
        self.baselines: dict[str, float] = {}
        """Held-out losses of methods that need no model."""
        self.untrained = math.nan
        """The held-out loss before training."""
        self.shares: dict[str, float] = {}
        """Accuracies of the untrained model and of the baselines."""
        self.peak: float | None = None
        """The processor's floating-point operations per second, if known."""
        self.stopped = False
        self._began = time.perf_counter()

    # What differs from model to model

    @property
    def plan(self) -> str:
        """The training in a few words."""
        return f"{self.config.steps} steps of {self.config.batch_size}"

    def measure(self) -> dict[str, float]:
        """Evaluate the model on the held-out data: `validation_loss` and others."""
        raise NotImplementedError

    def rank(self, metrics: Mapping[str, float]) -> float:
        """The number by which models are compared; lower is better."""
        return metrics["validation_loss"]

    def measure_baselines(self) -> None:
        """Fill `baselines`, and the baselines of `shares`."""

    def own_state(self) -> dict[str, Tensor]:
        """A checkpoint's tensors besides the model and the optimizer's state; all processes have them."""
        return {}

    def best_notes(self, metrics: Mapping[str, float]) -> dict[str, object]:
        """Notes on a model that is saved after an evaluation."""
        return {}

    @property
    def result(self) -> str:
        """The best evaluation in words."""
        return f"held-out loss {self.best:.4f}"

    # The training

    def stop(self) -> None:
        """End the iteration after the current step, with a checkpoint; in a team, when all know of it."""
        if self.team:
            self.team.asked = True
        else:
            self.stopped = True

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.team is None or self.team.rank == 0

    @property
    def n_processes(self) -> int:
        return self.team.size if self.team else 1

    def state(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint besides the model. In a team, the first process has all of them."""
        return self.trainer.state() | self.own_state()

    def shared(self, work: Callable[[T], R], items: Iterable[T]) -> Iterable[R]:
        """The results of `work` for each item, in order; a team's processes share the work."""
        return self.team.map(work, items) if self.team else map(work, items)

    @property
    def trainer(self) -> Trainer:
        """The trainer of the current stage."""
        unfinished = (trainer for trainer in self.trainers if trainer.step < trainer.config.steps)
        return next(unfinished, self.trainers[-1])

    @property
    def step(self) -> int:
        """The number of steps done, in all stages."""
        return sum(trainer.step for trainer in self.trainers)

    @property
    def finished(self) -> bool:
        return self.step == self.evaluated == self.config.total_steps

    def measure_start(self) -> None:
        """Measure the baselines and the untrained model, and begin the log.

        Raises LamaError if the untrained model's loss is not finite.
        """
        self.measure_baselines()
        metrics = self.measure()
        self.untrained = metrics["validation_loss"]
        if "accuracy" in metrics:
            self.shares = {"untrained": metrics["accuracy"], **self.shares}
        if not math.isfinite(self.untrained):
            raise LamaError(
                f"the loss before training must be finite; got {self.untrained}. Start from another model"
            )
        self.begin_log()

    def begin_log(self) -> None:
        facts = {"parameters": n_parameters(self.model), "peak_flops": self.peak}
        facts["devices"] = len(self.trainer.replicas)
        facts["processes"] = self.n_processes
        self.folder.log({**self.about, "config": asdict(self.config), **facts, **self._start()})

    def _start(self) -> dict[str, object]:
        """The measurements before training."""
        if not math.isfinite(self.untrained):
            return {}
        start: dict[str, object] = {"baselines": self.baselines, "untrained": self.untrained}
        return start | ({"shares": self.shares} if self.shares else {})

    def restore(self, checkpoint: Path) -> None:
        """Resume at a checkpoint, whose model this session has. Raises LamaError."""
        left = step_of(checkpoint)
        for trainer in self.trainers:
            trainer.step = min(left, trainer.config.steps)
            left -= trainer.step
        restore(self.state(), checkpoint)

    def recall(self, notes: Record) -> None:
        """Restore the measurements of a resumed run from its log or, if that is damaged, from `notes`."""
        records = self.cut(self.folder.log_file, self.folder.cut_log)
        known = records[0] if records and "baselines" in records[0] else notes
        self.about |= notes.get("about", {})
        self.about["command"] = known.get("command", f"lama train {self.folder.settings_file}")
        if {"baselines", "untrained"} <= known.keys():
            self.baselines, self.untrained = known["baselines"], known["untrained"]
            self.shares = known.get("shares", {})
        else:  # a checkpoint of an earlier version; uniform is about the loss of an untrained model
            self.measure_baselines()
            self.untrained = self.baselines.get("uniform", math.nan)
        evaluated = {record["step"]: self.rank(record) for record in records if "validation_loss" in record}
        self.evaluated = max(evaluated, default=0)
        self.best = min([notes.get("best_loss", math.inf), *evaluated.values()])
        self._began -= max(record.get("seconds", 0.0) for record in (*records, notes))
        if not records:
            self.begin_log()

    def cut(self, file: Path, cut: Callable[[int], R]) -> R:
        """Remove the records after the resumed step from a file of the run; rename a damaged file."""
        try:
            return cut(self.step)
        except LamaError as error:
            if isinstance(error.__cause__, OSError):  # the file is intact and cannot be written
                raise
            note(f"{error}. {file.name} is now {self.folder.set_aside(file).name}, and a new one begins")
            return cut(self.step)

    def __iter__(self) -> Iterator[Step | Evaluation]:
        """Train. Raises LamaError, with the last checkpoint, as `Trainer` does and for unwritable files."""
        last = self.trainers[-1]
        try:
            if self.team:
                self.team.copy(memory_of(self.own_state()).values())
            if last.step and self.step > self.evaluated and self._is_due(last):
                yield self.evaluate()  # the process ended between a checkpoint and its evaluation
            for trainer in self.trainers:
                for report in trainer:
                    step = replace(report, step=self.step)
                    speed = {"tokens_per_second": step.tokens_per_second, "mfu": self.mfu(step)}
                    self.folder.log({"step": step.step, **step.metrics, **speed, "seconds": self.seconds})
                    self.after_step(step)
                    if self.team:
                        self.stopped = self.team.stopped > 0
                    yield step
                    due = self._is_due(trainer)
                    stop = self.stopped and step.step < self.config.total_steps
                    if stop or due:
                        self.save_checkpoint()
                    if stop:
                        self._drop_old()
                        if not math.isfinite(self.best):  # so that there is a model to try
                            self.save_model()
                        return
                    if due and trainer is last:
                        yield self.evaluate()
                    elif due:
                        self._drop_old()
        except LamaError as error:
            raise LamaError(f"{error}. {self._way_on(error)}") from error

    def after_step(self, step: Step) -> None:
        """Called after each step, before it is yielded."""

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether a checkpoint is due and, in the last stage, an evaluation."""
        every = self.config.evaluation_steps
        return trainer.step == trainer.config.steps or (every > 0 and trainer.step % every == 0)

    def save_checkpoint(self) -> None:
        """Save a checkpoint. Raises LamaError as `RunFolder.save_checkpoint` does."""
        notes = {
            "data": self.digest,
            "config": asdict(self.config),
            "about": self.about,
            "command": self.about.get("command", ""),
            "devices": len(self.trainer.replicas),
            "processes": self.n_processes,
            "seconds": self.seconds,
            **self._start(),
        }
        if math.isfinite(self.best):
            notes["best_loss"] = self.best
        self.folder.save_checkpoint(self.step, self.model, self.tokenizer, self.state(), notes)
        if self.leads:
            tell_launcher({"step": self.step})

    def _drop_old(self) -> None:
        self.folder.drop(self.folder.checkpoints()[: -self.config.keep])

    def _way_on(self, error: LamaError) -> str:
        if not (found := self.folder.checkpoints()):
            return "There is no checkpoint yet"
        command = self.resume_command
        if isinstance(error, Diverged):
            path, rate = self.folder.path, f"{self.config.learning_rate / 3:.1g}"
            words = ["lama", "train", self.folder.settings_file]
            has_model = self.config.model == "gpt" and not (self.config.lora or self.config.dpo)
            words += ["--from", found[-1]] if has_model else []
            words += ["--out", path.with_name(f"{path.name}-2"), "--learning-rate", rate]
            for name in (f"{group}_learning_rate" for group in GROUPS):
                if own := getattr(self.config, name):
                    words += [f"--{name.replace('_', '-')}", f"{own / 3:.1g}"]
            command = shlex.join(map(str, words))
        return f"The last good checkpoint is {found[-1]}: continue with {command}"

    @property
    def resume_command(self) -> str:
        """The command that resumes this run."""
        words = ["lama", "train", "--resume", str(self.folder.path), *launch_options()]
        devices = [replica.device for replica in self.trainer.replicas]
        return shlex.join(words + (["--devices", ",".join(devices)] if devices[1:] else []))

    @property
    def seconds(self) -> float:
        """Seconds of the whole run, before and after it was resumed."""
        return round(time.perf_counter() - self._began, 3)

    def mfu(self, step: Step) -> float | None:
        """Model FLOP utilisation: the share of the peak that the arithmetic needs. None if unknown."""
        return None

    def evaluate(self) -> Evaluation:
        """Evaluate on the held-out data, and save the model in the folder if it is the best so far."""
        step, metrics = self.step, self.measure()
        if not math.isfinite(loss := metrics["validation_loss"]):
            self.folder.drop(path for path in self.folder.checkpoints() if step_of(path) == step)
            raise Diverged(
                f"training diverged: the held-out loss after step {step} is {loss}. Lower the learning rate"
            )
        best = (rank := self.rank(metrics)) < self.best
        self.best = min(self.best, rank)
        if self.leads and (best or not self.keeps_best):
            self.save_model(**self.best_notes(metrics))
        self.evaluated = step
        self._drop_old()  # before the record, with which a finished run is complete
        self.folder.log({"step": step, **metrics, "best": best, "seconds": self.seconds})
        return Evaluation(step, metrics, best)

    def load_best(self) -> None:
        """Load the weights of the folder's model into this session's model."""
        saved = open_weights(self.folder.path / "model.safetensors")
        for name, p in get_state_dict(self.model).items():
            write(p, saved[name].read())

    def add_notes(self, notes: Mapping[str, object]) -> None:
        """Add notes to those saved with the folder's model, which must be this session's model."""
        known = field_of(read_object(self.folder.path / "config.json"), "training", dict, "config.json")
        save(self.folder.path, self.model, self.tokenizer, {**known, **notes})

    def save_model(self, **notes: object) -> None:
        """Save the model in the folder, with notes on its training, if this process leads."""
        if not self.leads:
            return
        about = {**self.about, "steps": self.step, "seconds": round(self.seconds), **notes}
        save(self.folder.path, self.model, self.tokenizer, about)
