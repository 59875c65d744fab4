"""The memory and the arithmetic that a GPT's training needs."""

from tinygrad import Device

from lama.errors import UsageError
from lama.host import memory_bytes
from lama.models.gpt import GPT, GPTConfig
from lama.models.registry import n_parameters
from lama.runtime.device import open_device
from lama.training.optimizers import OPTIMIZERS
from lama.training.settings import RunConfig


def training_operations(model: GPT, context_length: int) -> float:
    """Floating-point operations of a training step's arithmetic for each token of a window.

    Source: Chowdhery et al. 2022 (PaLM), appendix B: 6 N + 12 · layers · d_model · T, N without the
    positions. A causal mask spares half of the last term.
    """
    c = model.config
    positions = c.context_length * c.d_model if c.positions == "learned" else 0
    return 6 * (n_parameters(model) - positions) + 12 * c.n_layers * c.d_model * context_length


def check_memory(config: RunConfig, shape: GPTConfig) -> None:
    """Raises UsageError for a model or a batch that this machine's memory cannot hold, on the CPU."""
    open_device()  # before tinygrad looks for one, which needs a compiler on PATH
    if not (memory := memory_bytes()) or not str(Device.DEFAULT).startswith("CPU"):
        return
    width, layers = shape.d_model, shape.n_layers
    rows = layers * (4 * width + 2 * shape.d_mlp), (2 - shape.tied) * shape.vocab_size
    states = OPTIMIZERS[config.optimizer].state_per_weight
    # Weights, gradients, the optimizer's state.
    fixed = sum(4 * (2 + state) * width * n for n, state in zip(rows, states, strict=True))
    here = f"this machine has {memory / 1e9:,.0f} GB"
    if fixed > memory:
        raise UsageError(
            f"training needs over {fixed / 1e9:,.0f} GB for weights, gradients and optimizer state; {here}. "
            f"Reduce n_layers={layers} or d_model={width}"
        )
    windows, context = config.batch_size // config.accumulation, config.context_length
    per_block = 8 * width + 2 * shape.d_mlp + shape.n_heads * context
    activations = (1 if config.recompute else layers) * per_block + shape.vocab_size
    if (needed := fixed + 4 * windows * context * activations) > memory:
        raise UsageError(
            f"training needs over {needed / 1e9:,.0f} GB for the model and a batch; {here}. "
            f"Raise accumulation={config.accumulation}: batch_size={config.batch_size} is in parts of "
            f"{windows} x {context} tokens"
        )
