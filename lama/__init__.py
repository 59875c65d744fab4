"""lama: the transformer from scratch in tinygrad.

    model, tokenizer = lama.load("gpt2")
    logits = model(tokens)                                             # (B, T) ints -> (B, T, vocab_size)
    for piece in lama.generate(model, tokenizer, "How can entropy be reversed?"):
        print(piece, end="", flush=True)

Importing lama only defines names. A name's module is imported when the name is first used.
"""

TYPE_CHECKING = False  # as in typing, whose import would take most of the time of `import lama`
if TYPE_CHECKING:
    from lama.checkpoints import load, save
    from lama.errors import LamaError, UsageError
    from lama.generation import generate
    from lama.generation.chat import chat
    from lama.models.gpt import GPT, GPTConfig

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig", "LamaError", "UsageError", "chat", "generate", "load", "save"]


def __getattr__(name: str) -> object:
    from lama.lazy import lazy_names

    homes = {
        "GPT": "lama.models.gpt",
        "GPTConfig": "lama.models.gpt",
        "LamaError": "lama.errors",
        "UsageError": "lama.errors",
        "chat": "lama.generation.chat",
        "generate": "lama.generation",
        "load": "lama.checkpoints",
        "save": "lama.checkpoints",
    }
    return lazy_names(__name__, homes)(name)
