"""A whole training run in a folder: prepared or resumed, then iterated over for its steps and evaluations."""

import functools
import math
import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinygrad import Device

from lama.checkpoints import load_gpt, named_tokenizer, save
from lama.data import Corpus, TokenFiles, evaluation_windows, fingerprint, ngram_baselines, open_corpus, open_tokens, tokenize
from lama.data.inputs import check_tokens
from lama.device import open_device
from lama.errors import LamaError, UsageError, note, quoted
from lama.files import quoted_path
from lama.kernels.peak import peak_flops
from lama.models.gpt import GPT, GPTConfig
from lama.models.quantized import refuse_quantized
from lama.tokenizers import BytePairTokenizer, CharacterTokenizer, Tokenizer, train_bpe
from lama.tokenizers.training import END_OF_TEXT, check_vocabulary
from lama.training.config import FINE_TUNING_RATE, MODEL_SETTINGS, RunConfig, checked_names, differences, parse_size, run_config, sizes
from lama.training.folder import Diverged, RunFolder, read_training, restore, step_of
from lama.training.loop import Step, Trainer, windows
from lama.training.loss import Evaluator
from lama.training.recording import Recording, what_to_record

OWN = "the model's"  # what the settings say of the tokenizer where the model brings its own
EVALUATION_BATCH = 16_384  # logits at a time: batch x context x vocabulary stays small for a big vocabulary too


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of the model on the held-out text after `step` updates."""

    step: int
    validation_loss: float
    """Nats per token."""
    bits_per_byte: float
    best: bool
    """Whether no evaluation of this run was better; the model was then saved."""

    @property
    def perplexity(self) -> float:
        """Perplexity of a token."""
        return math.exp(min(self.validation_loss, 700.0))


class Run:
    """Iterate over it for a `Step` after each update and an `Evaluation` when one is due.

    Every evaluation comes after a checkpoint. `stop()` ends the iteration after the step under way, with a checkpoint.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        model: GPT,
        tokenizer: Tokenizer,
        tokens: TokenFiles,
        about: Mapping[str, Any],
        devices: Sequence[str] = (),
    ):
        self.folder, self.config, self.model, self.tokenizer, self.tokens = folder, config, model, tokenizer, tokens
        self.about = dict(about)
        """How the model came to be: goes into its config.json."""
        self.trainer = Trainer(model, windows(tokens.train, config, config.context_length), config, devices=devices)
        limit = config.evaluation_tokens and max(1, config.evaluation_tokens // config.context_length)
        held_out = evaluation_windows(tokens.validation, config.context_length, limit or None)
        rows = max(1, min(config.batch_size, EVALUATION_BATCH // config.context_length))
        self.evaluator = Evaluator(model, held_out, rows)
        self.recording = Recording(folder.recording_file, model, config, tokenizer) if config.record else None
        self.best = math.inf
        self.judged = 0
        """The step after which the model was last evaluated."""
        self.baselines: dict[str, float] = {}
        self.untrained = math.nan
        self.peak = peak_flops(str(model.embed.weight.device))
        self._stopped = False
        self._began = time.perf_counter()
        self.seconds_before = 0.0
        """Spent on this run before it was resumed."""

    def stop(self) -> None:
        self._stopped = True

    @property
    def stopped(self) -> bool:
        return self._stopped

    @property
    def finished(self) -> bool:
        return self.trainer.step == self.judged == self.config.steps

    def measure_start(self) -> None:
        """Measure the n-gram baselines and the untrained model's loss, and begin the log. Raises LamaError for a loss that is none."""
        self.baselines = ngram_baselines(self.tokens.train, self.tokens.validation, self.tokenizer.vocab_size)
        self.untrained = self.evaluator()
        if not math.isfinite(self.untrained):
            raise LamaError(f"the loss before training must be finite; got {self.untrained}. Start from another model")
        self._begin_log()
        if self.recording:
            self.recording.begin()

    def _begin_log(self) -> None:
        facts = {"parameters": self.model.n_parameters(), "peak_flops": self.peak, "devices": len(self.trainer.replicas)}
        start = {"baselines": self.baselines, "untrained": self.untrained}
        self.folder.log({**self.about, "config": asdict(self.config), **facts, **start})

    def recall(self, notes: Mapping[str, Any]) -> None:
        """Take up what the log knows of a run that is resumed.

        A damaged log is set aside: what must be known stands in the checkpoint's `notes`, too, and a new log begins.
        """
        records = self._cut(self.folder.log_file, self.folder.cut_log)
        known = records[0] if records and "baselines" in records[0] else notes
        self.about["command"] = known.get("command", f"lama train {self.folder.settings_file}")
        if {"baselines", "untrained"} <= known.keys():
            self.baselines, self.untrained = known["baselines"], known["untrained"]
        else:  # a checkpoint of an earlier version: this is about what a model is worth that has learned nothing
            self.baselines = ngram_baselines(self.tokens.train, self.tokens.validation, self.tokenizer.vocab_size)
            self.untrained = self.baselines["uniform"]
        judged = {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}
        self.judged, self.best = max(judged, default=0), min([notes.get("best_loss", math.inf), *judged.values()])
        self.seconds_before = max(record.get("seconds", 0.0) for record in (*records, notes))
        if not records:
            self._begin_log()
        if self.recording:
            self._cut(self.recording.path, self.recording.cut)

    def _cut(self, file: Path, cut: Callable[[int], Any]) -> Any:
        """Let a file of the run forget what came after the step that is resumed; a damaged one begins anew."""
        try:
            return cut(self.trainer.step)
        except LamaError as error:
            if isinstance(error.__cause__, OSError):  # it is whole, and cannot be written
                raise
            note(f"{error}. {file.name} is now {self.folder.set_aside(file).name}, and a new one begins")
            return cut(self.trainer.step)

    def __iter__(self) -> Iterator[Step | Evaluation]:
        """Raises LamaError as `Trainer` does and where something cannot be written, with the last good checkpoint named."""
        try:
            if self._due():  # the process ended between a checkpoint and its evaluation
                yield self.evaluate()
            for step in self._steps():
                self.folder.log(
                    {
                        "step": step.step,
                        "loss": step.loss,
                        "learning_rate": step.learning_rate,
                        "gradient_norm": step.gradient_norm,
                        "tokens_per_second": step.tokens_per_second,
                        "mfu": self.mfu(step),
                        "seconds": self.seconds,
                    }
                )
                if self.recording and self.recording.due(step.step):
                    self.recording.take(step.step, step.loss)
                yield step
                stop = self._stopped and step.step < self.config.steps
                if stop or self._due():
                    self.save_checkpoint()
                if stop:
                    self._drop_old()
                    if not math.isfinite(self.best):  # so that there is a model to try
                        self._save_model({})
                    return
                if self._due():
                    yield self.evaluate()
                    self._drop_old()
        except LamaError as error:
            raise LamaError(f"{error}. {self._way_on(error)}") from error

    def save_checkpoint(self) -> None:
        """Raises LamaError as `RunFolder.save_checkpoint` does."""
        config, known = asdict(self.config), {"baselines": self.baselines, "untrained": self.untrained} if self.baselines else {}
        known |= {"best_loss": self.best} if math.isfinite(self.best) else {}
        about = {"command": self.about.get("command", ""), "devices": len(self.trainer.replicas), "seconds": self.seconds}
        self.folder.save_checkpoint(self.trainer, self.tokenizer, {"data": self.tokens.digest, "config": config, **about, **known})

    def _drop_old(self) -> None:
        self.folder.drop(self.folder.checkpoints()[: -self.config.keep])

    def _steps(self) -> Iterator[Step]:
        try:
            yield from self.trainer
        except LamaError as error:
            raise Diverged(str(error)) from error

    def _way_on(self, error: LamaError) -> str:
        if not (found := self.folder.checkpoints()):
            return "There is no checkpoint yet"
        command = self._anew(found[-1]) if isinstance(error, Diverged) else self.again
        return f"The last good checkpoint is {found[-1]}: go on from there with {command}"

    @property
    def again(self) -> str:
        """The command that goes on with this run where it stands."""
        devices = [replica.device for replica in self.trainer.replicas]
        return shlex.join(["lama", "train", "--resume", str(self.folder.path), *(["--devices", ",".join(devices)] if devices[1:] else [])])

    def _anew(self, checkpoint: Path) -> str:
        """The command that trains the model of `checkpoint` as this run did, but for a lower learning rate."""
        path = self.folder.path
        words = ["lama", "train", self.folder.settings_file, "--from", checkpoint, "--out", path.with_name(f"{path.name}-2")]
        return shlex.join(map(str, [*words, "--learning-rate", f"{self.config.learning_rate / 3:.1g}"]))

    def _due(self) -> bool:
        """Whether the model is to be evaluated now."""
        step, every = self.trainer.step, self.config.evaluate_every
        return step > self.judged and (step == self.config.steps or (every > 0 and step % every == 0))

    @property
    def seconds(self) -> float:
        """Seconds of the whole run, before and after its resumptions."""
        return round(self.seconds_before + time.perf_counter() - self._began, 3)

    def mfu(self, step: Step) -> float | None:
        """Model FLOP utilisation: the operations that the model's arithmetic needs, of those that the threads could do."""
        return None if self.peak is None else self._operations * step.tokens_per_second / self.peak

    @functools.cached_property
    def _operations(self) -> float:
        """For a token of the training."""
        return training_operations(self.model, self.config.context_length)

    def evaluate(self) -> Evaluation:
        """Judge by the held-out text; a model better than all before is saved where `lama generate -m` finds it."""
        loss = self.evaluator()
        if not math.isfinite(loss):
            self.folder.drop(path for path in self.folder.checkpoints() if step_of(path) == self.trainer.step)
            raise Diverged(f"the held-out loss must stay a number; got {loss} after step {self.trainer.step}. Lower the learning rate")
        bits = loss / math.log(2) * len(self.tokens.validation) / self.tokens.validation_bytes
        best = loss < self.best
        if best:
            self.best = loss
            self._save_model({"heldout_loss_nats_per_token": {**self.baselines, "untrained": self.untrained, "trained": loss}})
        self.judged = self.trainer.step
        self.folder.log({"step": self.trainer.step, "validation_loss": loss, "bits_per_byte": bits, "best": best, "seconds": self.seconds})
        return Evaluation(self.trainer.step, loss, bits, best)

    def _save_model(self, notes: Mapping[str, Any]) -> None:
        done = {"steps": self.trainer.step, "tokens_seen": self.trainer.step * self.config.batch_size * self.config.context_length}
        save(self.folder.path, self.model, self.tokenizer, {**self.about, **done, "seconds": round(self.seconds), **notes})


def new_run(
    folder: RunFolder,
    settings: Mapping[str, Any],
    command: str,
    size: str | None = None,
    devices: Sequence[str] = (),
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[Run, Corpus]:
    """Prepare a run: corpus, tokenizer, tokens on disk, model. The folder stays as it was if one of them does not fit.

    `settings` are those that were given; with `initial`, the model's own come before the others' defaults, and with `size`
    (a number of parameters) the shape is chosen. Raises LamaError.
    """
    given = dict(settings)
    model, tokenizer = None, None
    if initial := run_config(given).initial:  # all values are checked before a model is read
        if size is not None:
            raise UsageError(f"size and from must not be given together; got --size {quoted(size, plain=True)} and --from {initial}")
        source = Path(os.path.realpath(initial))
        if Path(os.path.realpath(folder.path)) in (source, *source.parents):
            where = quoted_path(folder.path)
            raise UsageError(f"--out must be another folder than that of the model to start from; got {where} and --from {initial}")
        model, tokenizer = load_gpt(initial)
        refuse_quantized(model, "to be trained")
        given = {"learning_rate": FINE_TUNING_RATE} | _of_the_model(given, model.config)
    config = run_config(given)
    corpus = open_corpus(config.corpus, without=folder.path)
    tokenizer = tokenizer or make_tokenizer(config.tokenizer, corpus)
    if size is not None:
        config = run_config({**sizes(parse_size(size), tokenizer.vocab_size, config.context_length), **given})
    try:
        shape = model.config if model else model_config(config, tokenizer.vocab_size)
    except ValueError as error:
        raise UsageError(str(error)) from error
    check_devices(config, devices)
    check_memory(config, shape)
    what_to_record(config, tokenizer, shape)
    with folder.beginning(config, command) as data:
        tokens = tokenize(corpus, tokenizer, data, config.validation, progress)
        _check_lengths(tokens, config)
        if tokenizer.vocab_size > shape.vocab_size:
            for part in (tokens.train, tokens.validation):
                check_tokens(tokenizer, [int(part.max())], shape.vocab_size)
        model = model or GPT(shape, config.seed)
    about = {"corpus": {"name": corpus.name, "provenance": corpus.provenance, "licence": corpus.licence}, "command": command}
    return Run(folder, config, model, tokenizer, open_tokens(folder.data), about, devices), corpus


def resumed_run(folder: RunFolder, changes: Mapping[str, Any], devices: Sequence[str] = ()) -> Run:
    """Go on with the run in `folder` where its last checkpoint stands, exactly as if it had not ended.

    `changes` are settings given now: those about reports may differ, others must be what they were. Raises LamaError where they
    are not, where the corpus is another, and where there is nothing to resume.
    """
    config = run_config({**folder.settings(), **changes})
    checkpoint = folder.last_checkpoint()
    notes = read_training(checkpoint)
    began = run_config(checked_names(notes["config"], str(checkpoint / "training.json")))
    if changed := differences(asdict(began), asdict(config)):
        raise UsageError(
            f"a resumed run must have the settings it began with; got {'; '.join(changed)}. "
            f"For another run, start from this one's model: --from {folder.path} --out DIR"
        )
    if (shares := folder.devices()) != max(1, len(devices)):
        raise UsageError(
            f"a resumed run must share its batches among as many devices as it began with; got {max(1, len(devices))}. "
            f"Give --devices {shares}"
        )
    check_devices(config, devices)
    tokens = open_tokens(folder.data, verify=True)
    _same_corpus(config, tokens, folder)
    model, tokenizer = load_gpt(checkpoint)
    if tokens.tokenizer_digest != fingerprint(tokenizer):
        raise LamaError(
            f"a resumed run must have the tokenizer that its data was made with; got {tokenizer.vocab_size} tokens in {checkpoint}, "
            f"{tokens.vocab_size} in {folder.data}, or as many others"
        )
    folder.clean()
    run = Run(folder, config, model, tokenizer, tokens, {"corpus": dict(tokens.corpus)}, devices)
    restore(run.trainer, checkpoint)
    if notes.get("data") != tokens.digest:
        raise LamaError(f"a resumed run must read the data it began with; got other tokens in {folder.data} than at {checkpoint.name}")
    run.recall(notes)
    return run


def training_operations(model: GPT, context_length: int) -> float:
    """Floating-point operations that the arithmetic of a training step needs for each token of a window.

    Source: Chowdhery et al. 2022 (PaLM), appendix B: 6 N + 12 · layers · d_model · T, N without the positions. A causal mask
    spares half of the last term.
    """
    c = model.config
    positions = c.context_length * c.d_model if c.positions == "learned" else 0
    return 6 * (model.n_parameters() - positions) + 12 * c.n_layers * c.d_model * context_length


def make_tokenizer(name: str, corpus: Corpus) -> Tokenizer:
    """The tokenizer that a setting names: bytes, character, gpt2, bpe:SIZE (trained on the corpus), or a folder. Raises LamaError."""
    if name.startswith("bpe:"):
        try:
            size = int(name.removeprefix("bpe:"))
        except ValueError:
            raise UsageError(f"tokenizer must be bpe:SIZE, such as bpe:2000; got {quoted(name)}") from None
        check_vocabulary(size, [END_OF_TEXT])
        trained: BytePairTokenizer = train_bpe(corpus.pieces(), size)
        return trained
    if name == "character":
        return CharacterTokenizer(corpus.characters())
    if name not in ("bytes", "gpt2") and not os.path.isdir(name):
        raise UsageError(f"tokenizer must be bytes, character, gpt2, bpe:SIZE or a folder; got {quoted(name)}")
    return named_tokenizer(name)


def model_config(config: RunConfig, vocab_size: int) -> GPTConfig:
    """The shape that the settings ask for. Raises ValueError."""
    return GPTConfig(vocab_size, **{name: getattr(config, name) for name in MODEL_SETTINGS})


def _of_the_model(given: dict[str, Any], shape: GPTConfig) -> dict[str, Any]:
    """The settings with those of the model that is trained on. Raises UsageError for others."""
    if given.get("tokenizer", OWN) != OWN:
        raise UsageError(
            f"the tokenizer must be the model's own with --from; got --tokenizer {quoted(given['tokenizer'], plain=True)}. Leave it out"
        )
    own = {name: getattr(shape, name) for name in MODEL_SETTINGS}
    for name in MODEL_SETTINGS:
        if name == "context_length" and name in given:
            if given[name] > shape.context_length:
                raise UsageError(f"context_length must be at most the model's, {shape.context_length}; got {given[name]}")
        elif name in given and given[name] != own[name]:
            raise UsageError(f"{name} must be the model's own with --from, {own[name]}; got {given[name]}. Leave it out")
    return {**own, **given, "tokenizer": OWN}


def _same_corpus(config: RunConfig, tokens: TokenFiles, folder: RunFolder) -> None:
    """Raises LamaError if the text that the tokens came from has changed since; one that is gone is no matter."""
    if "-" in config.corpus:
        return
    try:
        corpus = open_corpus(config.corpus, without=folder.path)
    except LamaError:
        return
    if corpus.digest() != tokens.text_digest:
        raise LamaError(f"a resumed run must read the text it began with; got {corpus.name}, which has changed. Start another with --out")


def _check_lengths(tokens: TokenFiles, config: RunConfig) -> None:
    """Raises LamaError if one of the two parts is shorter than a window and the token after it."""
    for part, data in (("training", tokens.train), ("held-out", tokens.validation)):
        if len(data) <= config.context_length:
            raise LamaError(
                f"the {part} part of the corpus must be longer than context_length; got {len(data):,} tokens, "
                f"context_length={config.context_length}. Use a longer text, a shorter context or another share: --validation"
            )


def check_devices(config: RunConfig, devices: Sequence[str]) -> None:
    """Raises UsageError if the batch cannot be shared out."""
    if config.batch_size % (config.accumulation * max(1, len(devices))):
        raise UsageError(
            f"batch_size must be a multiple of devices x accumulation; got batch_size={config.batch_size}, {len(devices)} devices, "
            f"accumulation={config.accumulation}"
        )


def check_memory(config: RunConfig, shape: GPTConfig) -> None:
    """Refuse, where the CPU is to train, a model or a batch that the memory of this machine cannot hold. Raises UsageError."""
    open_device()  # before tinygrad looks for one, which needs a compiler on PATH
    if not (str(Device.DEFAULT).startswith("CPU") and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names):
        return
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    matrices = shape.n_layers * (4 * shape.d_model + 2 * shape.d_mlp) + (2 - shape.tied) * shape.vocab_size
    fixed = 4 * 4 * shape.d_model * matrices  # weights, gradients, AdamW's two moments
    if fixed > there:
        raise UsageError(
            f"a model in training must fit the memory; got n_layers={shape.n_layers}, d_model={shape.d_model}, which need over "
            f"{fixed / 1e9:,.0f} GB of {there / 1e9:,.0f} GB. Take a smaller one"
        )
    rows, context = config.batch_size // config.accumulation, config.context_length
    layers = 1 if config.recompute else shape.n_layers
    floats = rows * context * (layers * (8 * shape.d_model + 2 * shape.d_mlp + shape.n_heads * context) + shape.vocab_size)
    if (needed := fixed + 4 * floats) > there:
        raise UsageError(
            f"a batch must fit the memory; got batch_size={config.batch_size} in accumulation={config.accumulation} parts of "
            f"{rows} x {context} tokens, which with the model need over {needed / 1e9:,.0f} GB of {there / 1e9:,.0f} GB. Raise accumulation"
        )
