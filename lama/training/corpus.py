"""Sessions that learn from a corpus: its tokens on the disk, and what a resumed run must find unchanged."""

import math
from pathlib import Path

from lama.data import Corpus, TokenFiles, fingerprint, open_corpus, open_tokens, tokenize
from lama.errors import LamaError
from lama.training.session import Parts, Session


class CorpusSession(Session):
    """A session whose data are windows of a corpus."""

    def __init__(self, parts: Parts, tokens: TokenFiles):
        super().__init__(parts, tokens.digest)
        self.tokens = tokens
        self.tokens_per_byte = len(tokens.validation) / max(1, tokens.validation_bytes)

    @property
    def plan(self) -> str:
        return f"{super().plan} x {self.config.context_length} tokens"

    def bits_per_byte(self, loss: float) -> float:
        """Bits per byte of the held-out text, for nats per token."""
        return loss / math.log(2) * self.tokens_per_byte

    def save_model(self, **notes: object) -> None:
        seen = {"tokens_seen": self.step * self.config.batch_size * self.config.context_length}
        super().save_model(**seen, **notes)


def new_tokens(parts: Parts, corpus: Corpus, data: Path) -> TokenFiles:
    """Tokenise the corpus into the folder `data`.

    Raises LamaError if one of the two parts is shorter than a window and the token after it.
    """
    config = parts.config
    tokens = tokenize(corpus, parts.tokenizer, data, config.validation, parts.progress)
    for part, ids in (("training", tokens.train), ("held-out", tokens.validation)):
        if len(ids) <= config.context_length:
            raise LamaError(
                f"the {part} part of the corpus must be longer than context_length; got {len(ids):,} tokens, "
                f"context_length={config.context_length}. Use a longer text, a shorter context or another "
                "share: --validation"
            )
    return tokens


def reopened_tokens(parts: Parts, checkpoint: Path) -> TokenFiles:
    """The tokens of a run to resume; its text may be missing.

    Raises LamaError for damaged tokens, for another tokenizer, and if the text has changed since.
    """
    folder, sources = parts.folder, parts.config.corpus
    tokens = open_tokens(folder.data, verify=True)
    try:
        corpus = None if "-" in sources else open_corpus(sources, without=folder.path)
    except LamaError:
        corpus = None
    if corpus and corpus.digest() != tokens.text_digest:
        raise LamaError(
            "a resumed run must read the text it began with; "
            f"got {corpus.name}, which has changed. Start another with --out"
        )
    if tokens.tokenizer_digest != fingerprint(parts.tokenizer):
        raise LamaError(
            "a resumed run must have the tokenizer that its data was made with; got "
            f"{parts.tokenizer.vocab_size} tokens in {checkpoint}, {tokens.vocab_size} in {tokens.folder}, "
            "or as many others"
        )
    return tokens
