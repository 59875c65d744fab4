"""Fill in the masked tokens of a text with a BERT."""

import numpy as np
from tinygrad import Tensor

from lama.data.inputs import check_length, check_tokens, masked_input
from lama.data.masked import MASK, MaskTokenizer, special_ids
from lama.errors import LamaError
from lama.models.bert import Bert


def fill_in(model: Bert, tokenizer: MaskTokenizer, text: str, best: int = 5) -> list[list[tuple[str, float]]]:
    """The `best` likeliest tokens for each [MASK], with their probabilities. Raises LamaError."""
    pad, mask = special_ids(tokenizer)
    ids, context = masked_input(tokenizer, text), model.config.context_length
    positions = [i for i, token in enumerate(ids) if token == mask]
    if not positions:
        raise LamaError(f"the text must have a {MASK} to fill in; got {text[:60]!r}")
    check_length(check_tokens(tokenizer, ids, model.config.vocab_size), context)
    # Lengths are multiples of 16, since each length is compiled.
    row = np.full((1, min(context, -(-len(ids) // 16) * 16)), pad, np.int32)
    row[0, : len(ids)] = ids
    logits = model.at(Tensor(row), Tensor(np.array([positions], np.int32)))
    chances = logits.softmax(-1).numpy()[0]
    chances[:, [pad, mask]] = 0
    chances[:, tokenizer.vocab_size :] = 0
    found = []
    for chance in chances:
        likeliest = np.argsort(-chance)[:best]
        found.append([(tokenizer.decode([int(i)]), float(chance[i])) for i in likeliest])
    return found
