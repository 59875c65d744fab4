"""A GPT's run of `lama train`."""

from collections.abc import Mapping

from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_state_dict

from lama.data import Corpus, TokenFiles, evaluation_windows, ngram_baselines
from lama.data.windows import Mixture
from lama.errors import LamaError, quoted
from lama.kernels.peak import peak_flops
from lama.models.adapters import digest_of_base, trained_parameters
from lama.models.gpt import GPT
from lama.shapes import Array
from lama.training.budget import adapter_memory, training_operations
from lama.training.chat import held_out_arrays, packed_rows
from lama.training.corpus import CorpusSession
from lama.training.lines import Record
from lama.training.loop import Batches, Step, Trainer, language_model_batches
from lama.training.loss import Evaluator, language_model_loss
from lama.training.recording import Recording
from lama.training.session import Parts
from lama.training.settings import RunConfig

EVALUATION_BATCH = 16_384  # tokens: keeps the logits small even for a large vocabulary


def data_of(tokens: TokenFiles, config: RunConfig) -> tuple[Batches, tuple[Array, ...]]:
    """The training batches, and the held-out arrays for evaluations."""
    if tokens.counted:
        train, held = (packed_rows(tokens, part, config) for part in ("train", "validation"))
        return train.batches(config.batch_size), held_out_arrays(held, config)
    context = config.context_length
    mixture = Mixture(tokens.sources, list(map(float, config.mixture))) if config.mixture else None
    ends = tokens.ends if config.separate else {}
    limit = config.evaluation_tokens and max(1, config.evaluation_tokens // context)
    held_out = evaluation_windows(tokens.validation, context, limit or None, ends.get("validation"))
    return language_model_batches(tokens.train, config, context, mixture, ends.get("train")), held_out


class Run(CorpusSession):
    """A GPT's training on a corpus, or on conversations."""

    config: RunConfig
    model: GPT
    corpus: Corpus | None = None
    """The text, in a new run."""

    def __init__(self, parts: Parts, tokens: TokenFiles):
        super().__init__(parts, tokens)
        self.about = {"corpus": dict(tokens.corpus), **self.about}
        config, model, context = self.config, self.model, self.config.context_length
        self.memory = adapter_memory(config, model) if config.lora else None
        """The memory that the training of an adapter will take, estimated before it starts."""
        self.trainers.append(self._trainer())
        if config.lora:
            self.about["base"] = {"model": model.name, "sha256": digest_of_base(model)}
        self.recording: Recording | None = None
        if config.record and self.leads:
            self.recording = Recording(self.folder.recording_file, model, config, self.tokenizer)
        held = {p.dtype for p in get_state_dict(model.blocks).values()}  # weights of bfloat16 round too
        bits = 16 if config.precision == "bfloat16" or dtypes.bfloat16 in held else 32
        if self.leads and (peak := peak_flops(str(model.embed.weight.device), bits)):
            self.peak = peak * self.n_processes
        self.operations = training_operations(model, context)

    def _trainer(self) -> Trainer:
        """The trainer; fills `evaluator`, too."""
        config, model = self.config, self.model
        batches, held_out = data_of(self.tokens, config)
        rows = max(1, min(config.batch_size, EVALUATION_BATCH // config.context_length))
        self.evaluator = Evaluator(model, held_out, rows)
        if config.lora:  # no more memory than a training step takes
            rows = config.batch_size // config.accumulation
            self.evaluator = Evaluator(model, held_out, rows, language_model_loss.in_pieces)
        return Trainer(model, batches, config, devices=self.devices, team=self.team)

    def measure(self) -> dict[str, float]:
        loss = self.evaluator(self.shared)
        return {"validation_loss": loss, "bits_per_byte": self.bits_per_byte(loss)}

    def measure_baselines(self) -> None:
        data = self.tokens
        if data.counted:
            return  # n-gram counts say little about an assistant's answers
        self.baselines = ngram_baselines(data.train, data.validation, self.tokenizer.vocab_size)

    def mfu(self, step: Step) -> float | None:
        return None if self.peak is None else self.operations * step.tokens_per_second / self.peak

    def measure_start(self) -> None:
        super().measure_start()
        if self.recording:
            self.recording.begin()

    def own_state(self) -> dict[str, Tensor]:
        """The adapter's tensors, unmerged: in an adapter's own files, one layer may hold several changes."""
        adapter = trained_parameters(self.model) if self.config.lora else {}
        return {f"adapter.{name}": p for name, p in adapter.items()}

    def recall(self, notes: Record) -> None:
        base = self.about.get("base")
        if base != (then := notes.get("about", {}).get("base")):
            rule = "a resumed run must have the model it began with"
            raise LamaError(f"{rule}; got other weights in {self.model.name} than at first: {quoted(then)}")
        super().recall(notes)
        if self.recording:
            self.cut(self.recording.path, self.recording.cut)

    def after_step(self, step: Step) -> None:
        if self.recording and self.recording.due(step.step):
            self.recording.take(step.step, step.loss)

    def best_notes(self, metrics: Mapping[str, float]) -> dict[str, object]:
        losses = {"untrained": self.untrained, "trained": metrics["validation_loss"]}
        return {"heldout_loss_nats_per_token": self.baselines | losses}
