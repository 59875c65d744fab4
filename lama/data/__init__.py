"""Corpora, their tokens on the disk, training windows and n-gram baselines."""

from lama.data.corpora import Corpus, default_corpus, open_corpus, text_corpus
from lama.data.ngrams import ngram_baselines, ngram_loss
from lama.data.pieces import encode_pieces
from lama.data.tokens import TokenFiles, fingerprint, open_tokens, tokenize
from lama.data.windows import batch, encode_corpus, evaluation_windows, split_tail

__all__ = [
    "Corpus",
    "TokenFiles",
    "batch",
    "default_corpus",
    "encode_corpus",
    "encode_pieces",
    "evaluation_windows",
    "fingerprint",
    "ngram_baselines",
    "ngram_loss",
    "open_corpus",
    "open_tokens",
    "split_tail",
    "text_corpus",
    "tokenize",
]
