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

GAPS = 1.06  # of the memory that tinygrad plans for a captured step, over what is in use at most
CAPTURED = 2_500_000  # bytes of a layer's kernels and of their descriptions, in all captured steps of a run
LIBRARIES = 50_000_000  # bytes of what reports import and keep: counts of n-grams, samples, pictures


def training_operations(model: GPT, context_length: int) -> float:
    """Floating-point operations of a training step's arithmetic for each token of a window.

    Source: Chowdhery et al. 2022 (PaLM), appendix B: 6 N + 12 · layers · d_model · T, N without the
    positions. A causal mask spares half of the last term.
    """
    c = model.config
    positions = c.context_length * c.d_model if c.positions == "learned" else 0
    of_weight = 4 if changes_of(model) else 6  # frozen weights need no gradient
    return of_weight * (n_parameters(model) - positions) + 12 * c.n_layers * c.d_model * context_length


@dataclass(frozen=True)
class AdapterMemory:
    """The bytes that training an adapter takes, by lama's kernels for the CPU."""

    process: int
    """All that the process holds before: the program, and the weights with the adapter."""
    weights: int
    """The part of `process` that the frozen weights are."""
    adapter: int
    """The adapter's gradients and the optimizer's state."""
    activations: int
    reports: int
    """Held-out losses, the keys and values of a sample, and the captured steps of all of these."""

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

    For each token of a part of a batch a block keeps: its input and that of its MLP; these normalised, for
    the layers with a change that read them; queries, keys and values, the heads' outputs, two numbers of a
    head's softmax; hidden layers of its MLP; the rank of each change; and what its magnitude, if it has one,
    multiplies. With `recompute` it keeps its input. To that comes once either a block at work, or logits and
    their gradients, of LOGITS at most.
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
    # Gradients, and sums of them that wait for others.
    copies = 1 + OPTIMIZERS[config.optimizer].state_per_weight[0] + levels_of_sum(config.accumulation)
    cache = 2 * c.n_layers * kv * config.context_length
    reports = tokens * max(forward) + piece * c.vocab_size + cache
    adapter = copies * size_of(trained)
    steps = CAPTURED * c.n_layers + LIBRARIES
    activations = int(4 * GAPS * numbers)
    return AdapterMemory(resident_bytes(), weights, 4 * adapter, activations, 4 * reports + steps)


def check_adapter_memory(config: RunConfig, model: GPT, sharing: int = 1) -> None:
    """Raises UsageError if this machine's memory cannot hold the training of an adapter, on the CPU.

    `sharing` processes train on this machine.
    """
    found, memory = adapter_memory(config, model), memory_bytes()
    if memory and str(Device.DEFAULT).startswith("CPU") and sharing * found.total > memory:
        here = f"this machine has {memory / 1e9:,.1f} GB" + _shared(sharing)
        advice = "a smaller context_length, more accumulation or recompute needs less"
        raise UsageError(f"training needs {found}; {here}: {advice}")


def _shared(sharing: int) -> str:
    return f" for {sharing} processes" if sharing > 1 else ""


def check_memory(config: RunConfig, shape: GPTConfig, processes: int = 1, sharing: int = 1) -> None:
    """Raises UsageError for a model or a batch that this machine's memory cannot hold, on the CPU.

    Of all `processes`, `sharing` are on this machine. Each has the weights, and its part of the state.
    """
    open_device()  # before tinygrad looks for one, which needs a compiler on PATH
    if not (memory := memory_bytes()) or not str(Device.DEFAULT).startswith("CPU"):
        return
    width, layers = shape.d_model, shape.n_layers
    rows = layers * (4 * width + 2 * shape.d_mlp), (2 - shape.tied) * shape.vocab_size
    states = OPTIMIZERS[config.optimizer].state_per_weight
    # Weights, gradients, sums of them, the optimizer's state.
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
