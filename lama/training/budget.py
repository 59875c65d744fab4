"""The memory and the arithmetic that a GPT's training needs."""

from dataclasses import astuple, dataclass

from tinygrad import Device
from tinygrad.nn.state import get_state_dict

from lama.errors import UsageError
from lama.host import memory_bytes, resident_bytes
from lama.models.adapters import changes_of, size_of, trained_parameters
from lama.models.gpt import GPT, GPTConfig
from lama.models.registry import n_parameters
from lama.runtime.device import open_device
from lama.training.loss import LOGITS, pieces
from lama.training.optimizers import OPTIMIZERS
from lama.training.settings import RunConfig
from lama.training.sums import levels_of_sum

GAPS = 1.06  # the memory that tinygrad plans for a captured step, over the most that is in use at once
CAPTURED = 2_500_000  # bytes of a layer's kernels and their descriptions, in all captured steps of a run
LIBRARIES = 50_000_000  # bytes of modules that reports import and data that they keep, such as n-gram counts


def training_operations(model: GPT, context_length: int) -> float:
    """Floating-point operations of a training step for each token of a window.

    Source: Chowdhery et al. 2022 (PaLM), appendix B: 6 N + 12 · layers · d_model · T, where N excludes
    positions. A causal mask needs only half of the last term.
    """
    c = model.config
    positions = c.context_length * c.d_model if c.positions == "learned" else 0
    of_weight = 4 if changes_of(model) else 6  # frozen weights need no gradient
    return of_weight * (n_parameters(model) - positions) + 12 * c.n_layers * c.d_model * context_length


@dataclass(frozen=True)
class AdapterMemory:
    """The bytes that training an adapter takes with lama's CPU kernels."""

    process: int
    """The process's memory before training: the program, and the weights with the adapter."""
    weights: int
    """The frozen weights' part of `process`."""
    adapter: int
    """The adapter's gradients and the optimizer's state."""
    activations: int
    reports: int
    """Memory of evaluations, of a sample's keys and values, and of all captured steps."""

    @property
    def total(self) -> int:
        return self.process + self.adapter + self.activations + self.reports

    def __str__(self) -> str:
        program, *parts = (f"{n / 1e6:,.0f} MB" for n in (self.process - self.weights, *astuple(self)[1:]))
        known = "weights {}, the adapter's gradients and state {}, activations {}, reports {}".format(*parts)
        if not self.process:
            return known
        return f"{known}; with the program and the adapter, {program}, {self.total / 1e6:,.0f} MB"


def adapter_memory(config: RunConfig, model: GPT) -> AdapterMemory:
    """The memory of training a model's adapter.

    For each token of a part of a batch, a block keeps its input and that of its MLP. It keeps these
    normalised, too, if a layer with a change reads them. It also keeps queries, keys and values, the heads'
    outputs, two numbers of each head's softmax, and the MLP's hidden layers. Each change adds its rank, and
    the numbers that its magnitude multiplies, if it has one. With `recompute`, a block keeps only its input.
    Finally there is one block's working memory, or logits and their gradients, at most LOGITS, whichever is
    larger.
    """
    c, changes = model.config, changes_of(model)
    tokens = config.batch_size // config.accumulation * config.context_length
    q, kv = c.n_heads * c.d_head, c.n_kv_heads * c.d_head
    widths = {"qkv": q + 2 * kv, "out": c.d_model, "gate": c.d_mlp, "up": c.d_mlp, "down": c.d_model}
    kept, at_work, forward = [0], [0], [0]
    for i in range(c.n_layers):
        own = {n.split(".")[-1]: x for n, x in changes.items() if n.startswith(f"blocks.{i}.")}
        ranks = {part: int(x.a.shape[0]) for part, x in own.items()}
        scaled = {"qkv" if part in "qkv" else part for part, x in own.items() if x.magnitude is not None}
        has_up, has_down = "gate" in ranks or "up" in ranks, "down" in ranks
        normed = any(part in ranks for part in "qkv") + (has_up or not c.gated)
        rest = (2 + normed) * c.d_model + 2 * (q + kv + c.n_heads) + sum(ranks.values())
        rest += sum(widths[part] for part in scaled)
        if c.gated:
            hidden, most = 2 + has_down, 5 + has_up
        else:  # without a change of `up`, one kernel computes GELU and its slope
            hidden, most = (1 + has_down, 4) if has_up else (2, 5 if has_down else 2)
        kept.append(rest + hidden * c.d_mlp)
        at_work.append(rest - c.d_model + most * c.d_mlp)
        forward.append(2 * c.d_model + (most - 1) * c.d_mlp)
    if config.recompute:
        stream, working = (c.n_layers + 1) * c.d_model, max(at_work)
    else:
        stream, working = sum(kept) + c.d_model, max(at_work) - kept[-1] + c.d_model
    piece = pieces(tokens, LOGITS // c.vocab_size)[0].stop
    numbers = tokens * stream + max(tokens * working, 2 * piece * c.vocab_size)
    trained = trained_parameters(model)
    weights = sum(w.nbytes() for n, w in get_state_dict(model).items() if ".adapter." not in n)
    # Gradients, and partial sums of them.
    copies = 1 + OPTIMIZERS[config.optimizer].state_per_weight[0] + levels_of_sum(config.accumulation)
    cache = 2 * c.n_layers * kv * config.context_length
    reports = tokens * max(forward) + piece * c.vocab_size + cache
    adapter = copies * size_of(trained)
    steps = CAPTURED * c.n_layers + LIBRARIES
    activations = int(4 * GAPS * numbers)
    return AdapterMemory(resident_bytes(), weights, 4 * adapter, activations, 4 * reports + steps)


def check_adapter_memory(config: RunConfig, model: GPT, sharing: int = 1) -> None:
    """Raise UsageError if this machine's memory is too small to train an adapter, on the CPU.

    `sharing` is the number of processes that train on this machine.
    """
    found, memory = adapter_memory(config, model), memory_bytes()
    if memory and str(Device.DEFAULT).startswith("CPU") and sharing * found.total > memory:
        here = f"this machine has {memory / 1e9:,.1f} GB" + _shared(sharing)
        advice = "a smaller context_length, more accumulation or recompute needs less"
        raise UsageError(f"training needs {found}; {here}: {advice}")


def _shared(sharing: int) -> str:
    return f" for {sharing} processes" if sharing > 1 else ""


def check_memory(config: RunConfig, shape: GPTConfig, processes: int = 1, sharing: int = 1) -> None:
    """Raise UsageError if this machine's memory is too small for the model or a batch, on the CPU.

    Of all `processes`, `sharing` are on this machine. Each has all weights, and its part of the state.
    """
    open_device()  # before tinygrad looks for one, which needs a compiler on PATH
    if not (memory := memory_bytes()) or not str(Device.DEFAULT).startswith("CPU"):
        return
    width, layers = shape.d_model, shape.n_layers
    rows = layers * (4 * width + 2 * shape.d_mlp), (2 - shape.tied) * shape.vocab_size
    states = OPTIMIZERS[config.optimizer].state_per_weight
    # Weights, gradients, partial sums of gradients, the optimizer's state.
    copies = 2 + levels_of_sum(config.accumulation // processes)
    each = sum(4 * (copies + state / processes) * width * n for n, state in zip(rows, states, strict=True))
    fixed = sharing * each
    here = f"this machine has {memory / 1e9:,.0f} GB" + _shared(sharing)
    if fixed > memory:
        raise UsageError(
            f"training needs over {fixed / 1e9:,.0f} GB for weights, gradients and optimizer state; {here}. "
            f"Reduce n_layers={layers} or d_model={width}"
        )
    windows, context = config.batch_size // config.accumulation, config.context_length
    per_block = 8 * width + 2 * shape.d_mlp + shape.n_heads * context
    activations = (1 if config.recompute else layers) * per_block + shape.vocab_size
    if (needed := fixed + sharing * 4 * windows * context * activations) > memory:
        raise UsageError(
            f"training needs over {needed / 1e9:,.0f} GB for the model and a batch; {here}. "
            f"Raise accumulation={config.accumulation}: batch_size={config.batch_size} is in parts of "
            f"{windows} x {context} tokens"
        )
