"""Generation: logits to a token, prefill and decode, stopping, batches, text."""

from lama.generation.decoder import Runner
from lama.generation.sampling import Sampling, next_token, probabilities
from lama.generation.text import Generation, check_options, generate
from lama.generation.tokens import generate_tokens

__all__ = [
    "Generation",
    "Runner",
    "Sampling",
    "check_options",
    "generate",
    "generate_tokens",
    "next_token",
    "probabilities",
]
