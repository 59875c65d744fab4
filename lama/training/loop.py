"""The training loop: draw a batch, step, report; an iterator, so that whoever runs it can watch, save or stop."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tinygrad import Context, Tensor
from tinygrad.nn.optim import AdamW, OptimizerGroup
from tinygrad.nn.state import get_parameters, get_state_dict

from lama.data import batch
from lama.errors import LamaError, UsageError
from lama.jit import capture_at_once
from lama.models.gpt import GPT
from lama.training.loss import cross_entropy
from lama.training.schedule import cosine


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained. The defaults suit a model of about a million parameters."""

    steps: int = 1000
    """Updates of the weights."""
    batch_size: int = 12
    """Windows in a batch."""
    learning_rate: float = 2e-3
    """The peak, after the warm-up."""
    min_learning_rate: float = 2e-4
    """The end of the cosine."""
    warmup: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """AdamW's decay, on matrices only."""
    beta1: float = 0.9
    """AdamW's decay rate of the gradient's mean."""
    beta2: float = 0.99
    """AdamW's decay rate of the squared gradient's mean."""
    gradient_clip: float = 1.0
    """Largest global norm of the gradient."""
    seed: int = 0
    """Decides the order of the batches."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"learning_rate must be above 0; got {self.learning_rate}")
        if self.seed < 0:
            raise UsageError(f"seed must be 0 or above; got {self.seed}")


@dataclass(frozen=True)
class Step:
    """One update, as it is reported."""

    step: int
    """From 1."""
    loss: float
    """Of this step's batch before the update, nats per token."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    tokens_per_second: float
    """Over the last 20 steps; the first, which compiles, counts only for itself."""
    seconds_left: float


def make_optimizer(model: GPT, config: TrainingConfig) -> OptimizerGroup:
    """AdamW with decay on matrices and embeddings, none on biases and norms. Source: Loshchilov & Hutter 2019."""
    parameters = get_parameters(model)
    matrices, vectors = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [(matrices, config.weight_decay), (vectors, 0.0)]
    return OptimizerGroup(*(AdamW(p, 0.0, config.beta1, config.beta2, weight_decay=decay) for p, decay in groups if p))


def clip(gradients: list[Tensor], limit: float) -> Tensor:
    """Scale the gradients in place so that their global norm is at most `limit`; returns the norm before, shape (1,)."""
    norm = sum((g.square().sum() for g in gradients), Tensor.zeros(1)).sqrt().contiguous()
    scale = (limit / (norm + 1e-6)).minimum(1.0)
    for gradient in gradients:
        gradient.replace((gradient * scale.cast(gradient.dtype)).contiguous())
    return norm


def train(model: GPT, data: np.ndarray, config: TrainingConfig) -> Iterator[Step]:
    """Train `model` on random windows of `data`, token ids (n,); yields after each step. Stop by not asking for more.

    Raises LamaError if the loss is no longer a number: the step is named, the weights of that step are lost.
    """
    context = model.config.context_length
    optimizer = make_optimizer(model, config)
    rates = [group.lr for group in optimizer.optimizers]

    Tensor.realize(*get_state_dict(optimizer).values())

    @capture_at_once
    def update(inputs: Tensor, targets: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets).backward()
        norm = clip([p.grad for p in optimizer.params if p.grad is not None], config.gradient_clip)
        for r in rates:
            r.assign(rate)
        Tensor.realize(loss, norm, *optimizer.schedule_step())
        return loss, norm

    durations: list[float] = []
    for step in range(config.steps):
        began = time.perf_counter()
        rate = cosine(step, config.steps, config.learning_rate, config.min_learning_rate, config.warmup)
        inputs, targets = (Tensor(part).realize() for part in batch(data, step, config.seed, config.batch_size, context))
        with Context(TRAINING=1):
            loss, norm = (float(t.item()) for t in update(inputs, targets, Tensor([rate]).realize()))
        if not np.isfinite(loss) or not np.isfinite(norm):
            raise LamaError(
                f"the loss must stay a number; got loss={loss}, gradient norm={norm} at step {step + 1}. Lower the learning rate"
            )
        durations = [*durations[-19:], time.perf_counter() - began]
        if step == 1:  # the first step compiled
            durations = durations[-1:]
        mean = sum(durations) / len(durations)
        yield Step(step + 1, loss, rate, norm, config.batch_size * context / mean, mean * (config.steps - step - 1))
