"""Same bits: whether a token's logits depend on the batch and on the chunks in which its prompt was fed."""

from lama.attention import scale_of
from lama.kernels.attention import WIDEST
from lama.kernels.integers import multiplies_integers
from lama.kernels.quantized import Quantized
from lama.layers import LayerNorm, RMSNorm
from lama.models.protocol import CausalLM
from lama.models.quantized import matrices_of
from lama.runtime.kernel import is_fast


def exact_obstacle(model: CausalLM) -> str | None:
    """The reason why the last bits of a token's logits may depend on the batch or on its prompt's chunks.

    None if they never do: every sum then has one order, whatever the number of rows, new tokens and threads.
    That order depends only on the model and the processor.
    """
    weights = [layer.weight for layer in matrices_of(model).values()]
    tensors = [t for w in weights for t in (w.tensors() if isinstance(w, Quantized) else [w])]
    if not is_fast(*tensors):
        return "lama's kernels for the CPU are not in use"
    has_integers = any(isinstance(w, Quantized) and w.rounds for w in weights)
    if has_integers and not multiplies_integers(str(tensors[0].device)):
        return "this processor has no instruction for products of integers"
    for block in model.blocks:
        attn = block.attn
        if scale_of(attn.similarity, attn.d_head) is None:
            return "its attention scores are not a scaled dot product"
        if attn.d_head > WIDEST:
            return f"its heads have more than {WIDEST} numbers"
        norms = [part for part in vars(block).values() if isinstance(part, LayerNorm | RMSNorm)]
        if any(norm.weight is None for norm in norms):
            return "its norms have no weights"
    return None
