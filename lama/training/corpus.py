"""Sessions that train on a corpus: its tokens on the disk, and checks that a resumed run has the same."""

import math
import os
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from lama.data import Corpus, TokenFiles, fingerprint, open_corpus, open_tokens, tokenize
from lama.data.conversations import digest_of
from lama.data.corpora import is_tokenized
from lama.data.tokens import own_tokenizer
from lama.errors import LamaError, UsageError
from lama.tokenizers import Tokenizer
from lama.training.session import Parts, Session
from lama.training.settings import RunConfig
from lama.training.settings.base import CorpusSettings


class CorpusSession(Session):
    """A session whose data are windows of a corpus."""

    def __init__(self, parts: Parts, tokens: TokenFiles):
        super().__init__(parts, tokens.digest)
        self.tokens = tokens
        counted = int(tokens.counted["validation"].sum()) if tokens.counted else len(tokens.validation)
        self.tokens_per_byte = counted / max(1, tokens.validation_bytes)

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
    """Tokenise the corpus into the folder `data`. Raises LamaError as `tokenize` and `check_lengths` do."""
    config = parts.config
    tokens = tokenize(corpus, parts.tokenizer, data, config.validation, parts.progress)
    check_lengths(tokens, config)
    return tokens


def tokenized_folder(config: RunConfig) -> Path | None:
    """The folder that `lama data` wrote, if the corpus is one."""
    if len(config.corpus) != 1 or not is_tokenized(folder := Path(os.path.expanduser(config.corpus[0]))):
        return None
    return folder


def tokenized_corpus(folder: Path, tokenizer: Tokenizer | None) -> tuple[TokenFiles, Tokenizer]:
    """The tokens of a corpus that `lama data` wrote, and their tokenizer.

    Raises LamaError for damaged tokens, and for those of another tokenizer than the given one.
    """
    tokens = open_tokens(folder, verify=True)
    tokenizer = tokenizer or own_tokenizer(folder)
    check_tokenizer(tokens, tokenizer)
    return tokens, tokenizer


def check_tokenizer(tokens: TokenFiles, tokenizer: Tokenizer) -> None:
    """Raise LamaError if the tokens were made with another tokenizer."""
    if tokens.tokenizer_digest != fingerprint(tokenizer):
        sizes = f"vocabularies of {tokens.vocab_size:,} and {tokenizer.vocab_size:,} tokens"
        raise LamaError(f"{tokens.folder} was made with another tokenizer than the model's; got {sizes}")


def check_lengths(tokens: TokenFiles, config: CorpusSettings) -> None:
    """Raise LamaError if a part, or a source with a share in the mixture, is too short for a window."""
    for part, ids in (("training", tokens.train), ("held-out", tokens.validation)):
        if len(ids) <= config.context_length:
            raise LamaError(
                f"the {part} part of the corpus must be longer than context_length; got {len(ids):,} tokens, "
                f"context_length={config.context_length}. Use a longer text, a shorter context or another "
                "share: --validation"
            )
    mixture = config.mixture if isinstance(config, RunConfig) else ()
    if mixture and len(mixture) != len(tokens.sources):
        got = f"got {len(mixture)} for {len(tokens.sources)}"
        raise UsageError(f"mixture must have a number for each corpus; {got}")
    for i, (begin, end) in enumerate(pairwise([0, *tokens.sources]), 1):
        if mixture and end - begin <= config.context_length:
            got = f"{end - begin:,} training tokens, context_length={config.context_length}"
            raise LamaError(f"a corpus with a share must be longer than context_length; corpus {i} has {got}")


def reopened_tokens(parts: Parts, checkpoint: Path) -> TokenFiles:
    """The tokens of a run to resume; its text may be missing.

    Raises LamaError for damaged tokens, for another tokenizer, and if the text has changed since.
    """
    folder, config = parts.folder, parts.config
    tokens = open_tokens(folder.data, verify=True)
    groups = [config.corpus]
    if tokens.counted:
        groups = [sources for sources in (config.chat, config.chat_held_out) if sources]
    digest, names = None, ""
    if not any("-" in each for each in groups):  # standard input cannot be read again
        with suppress(LamaError):
            corpora = [open_corpus(each, folder.path, read=False) for each in groups]
            names = " or ".join(corpus.name for corpus in corpora)
            digest = digest_of(corpora) if tokens.counted else corpora[0].digest()
    if digest not in (None, tokens.text_digest):
        raise LamaError(
            "a resumed run must read the text it began with; "
            f"got {names}, which has changed. Start another with --out"
        )
    if tokens.tokenizer_digest != fingerprint(parts.tokenizer):
        raise LamaError(
            "a resumed run must have the tokenizer that its data was made with; got another in "
            f"{checkpoint} ({parts.tokenizer.vocab_size} tokens) than in {tokens.folder} "
            f"({tokens.vocab_size})"
        )
    return tokens
