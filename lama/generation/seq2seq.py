"""From source tokens to target tokens with an encoder-decoder: greedy search and beam search."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
from tinygrad import Tensor, dtypes

from lama.data.pairs import PairData, padded, pair_arrays
from lama.errors import LamaError, UsageError
from lama.generation.decoder import bucket
from lama.models.encoder_decoder import Transformer
from lama.runtime.buffers import read, write, zeros
from lama.runtime.capture import CapturedStep, InputBuffer
from lama.shapes import Array

EXTRA = 50
"""Largest excess of a target over its source, in tokens. Source: Vaswani et al. 2017, section 6.1."""
BATCH = 64  # sources at a time
Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class Hypothesis:
    """A target, or its beginning."""

    tokens: list[int]
    """Tokens without begin and end."""
    log_probability: float
    """Log-probability of the tokens, and of the end if it has ended, in nats."""
    ended: bool
    """Whether it ends with the end token, and not because there was no room for more."""

    def score(self, alpha: float) -> float:
        """log P / ((5 + n) / 6)^α for n tokens with the end's. Source: Wu et al. 2016, equation 14."""
        return self.log_probability / ((5 + len(self.tokens) + self.ended) / 6) ** alpha


class PairDecoder:
    """Encoder and decoder for sources of one padded length; targets are fed one token at a time.

    Every source has `beam` consecutive rows, which share its encoding. Keys and values of cross-attention are
    computed once for a batch of sources, those of self-attention once for each token.
    """

    def __init__(self, model: Transformer, n_sources: int, beam: int, source_length: int, length: int):
        self.model, self.beam, self.length, self.position = model, beam, length, 0
        self.rows = n_sources * beam
        self.cache = model.new_cache(self.rows, length)
        c, weight = model.config, model.embed.weight
        device, shape = str(weight.device), (self.rows, c.n_heads, source_length, c.d_model // c.n_heads)
        blank = partial(zeros, *shape, dtype=weight.dtype, device=device)
        self._memory = [(blank(), blank()) for _ in range(c.n_decoder_layers)]
        self._mask = zeros(self.rows, 1, 1, source_length, dtype=dtypes.bool, device=device)
        self._encode, self._decode = CapturedStep(self._encode_step), CapturedStep(self._decode_step)
        self._sources, self._tokens = InputBuffer(device), InputBuffer(device)
        self._positions = InputBuffer(device)

    def start(self, sources: Array) -> None:
        """Encode sources (n_sources, source_length) and restart the targets."""
        self._encode(self._sources(sources.astype(np.int32)))
        self.position = 0

    def step(self, tokens: Array) -> Array:
        """Feed each row one more token, `tokens` (rows,).

        Returns the next log-probabilities (rows, vocab_size), float64. Raises LamaError if not finite.
        """
        positions = self._positions(np.full(self.rows, self.position, np.int32))
        fed = self._tokens(tokens.astype(np.int32).reshape(-1, 1))
        logits: Array = self._decode(fed, positions).numpy().astype(np.float64)
        if not np.isfinite(logits).all():
            found = f"{logits.min()} to {logits.max()}"
            raise LamaError(f"logits must be finite; got {found} at token {self.position}")
        self.position += 1
        logits -= logits.max(-1, keepdims=True)
        log_p: Array = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return log_p

    def choose(self, rows: Array) -> None:
        """Continue with the targets of `rows` (rows,): row i becomes a copy of row rows[i]."""
        if (rows == np.arange(len(rows))).all():
            return
        for t in (*self.cache.keys, *self.cache.values):
            write(t, read(t).reshape(len(rows), -1)[rows])

    def _encode_step(self, sources: Tensor) -> Tensor:
        memory, mask = self.model.encode(sources)
        old = [self._mask, *chain(*self._memory)]
        new = [mask, *chain(*self.model.keys_values(memory))]
        for a, b in zip(old, new, strict=True):
            a.assign(b.repeat_interleave(self.beam, 0).cast(a.dtype))
        Tensor.realize(*old)
        return self._mask

    def _decode_step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.model.decode(tokens, self._memory, self._mask, self.cache.at(positions))
        return self.model.logits(x).squeeze(1).cast(dtypes.float32).realize()


class Searcher:
    """Search for targets of sources, token ids that end in the model's end token. Keeps its decoders."""

    def __init__(self, model: Transformer):
        self.model = model
        self._decoders: dict[tuple[int, int, int], PairDecoder] = {}

    def greedy(self, sources: Sequence[Sequence[int]], extra: int = EXTRA) -> list[Hypothesis]:
        """Targets of the most likely tokens, up to the end token or `extra` tokens longer than the source."""
        c, n = self.model.config, len(sources)
        decoder, limits = self.started(sources, 1, extra)
        targets: list[list[int]] = [[] for _ in range(n)]
        log_p, ended, last = np.zeros(n), [False] * n, np.full(decoder.rows, c.begin)
        going = list(range(n))
        while going and decoder.position < decoder.length:
            scores, last = self._scores(decoder, last), np.full(decoder.rows, c.pad)
            for i in going:
                last[i] = token = int(scores[i].argmax())
                log_p[i] += scores[i, token]
                if token == c.end:
                    ended[i] = True
                else:
                    targets[i].append(token)
            going = [i for i in going if not ended[i] and len(targets[i]) < limits[i]]
        return [Hypothesis(targets[i], float(log_p[i]), ended[i]) for i in range(n)]

    def answers(self, sources: Sequence[Sequence[int]], progress: Progress = iter) -> list[Hypothesis]:
        """Greedy targets of any number of sources; `progress` wraps the sequence of batch starts."""
        starts = progress(range(0, len(sources), BATCH))
        return [found for i in starts for found in self.greedy(sources[i : i + BATCH])]

    def beam(
        self, sources: Sequence[Sequence[int]], beam: int = 4, alpha: float = 0.6, extra: int = EXTRA
    ) -> list[list[Hypothesis]]:
        """Up to `beam` targets for each source, the best score first. Raises UsageError.

        Each step keeps a source's `beam` most likely continuations and sets those that end aside. The source
        is done when no other could score higher than the best of these. A beam of 1 is greedy.
        """
        if beam < 1 or not 0 <= alpha < float("inf"):
            raise UsageError(f"beam must be at least 1 and alpha at least 0; got beam={beam}, alpha={alpha}")
        c, n = self.model.config, len(sources)
        beam = min(beam, c.vocab_size - 3)  # each row is asked for as many continuations, and the end
        decoder, limits = self.started(sources, beam, extra)
        rows = decoder.rows
        alive = [[Hypothesis([], 0.0, False)] for _ in range(n)]
        done: list[list[Hypothesis]] = [[] for _ in range(n)]
        last = np.full(rows, c.begin)
        while any(alive) and decoder.position < decoder.length:
            scores = self._scores(decoder, last)
            last, origin = np.full(rows, c.pad), np.arange(rows)
            for i in range(n):
                first = i * beam
                if not alive[i]:
                    continue
                of_source = scores[first : first + len(alive[i])]
                alive[i], ended, parents = _extended(alive[i], of_source, beam, c.end)
                done[i] += ended
                if alive[i] and len(alive[i][0].tokens) == limits[i]:
                    done[i] += alive[i]  # no room for the end
                    alive[i] = []
                if _finished(alive[i], done[i], beam, alpha, limits[i]):
                    alive[i] = []
                for j, hypothesis in enumerate(alive[i]):
                    last[first + j], origin[first + j] = hypothesis.tokens[-1], first + parents[j]
            decoder.choose(origin)
        return [sorted(found, key=lambda h: -h.score(alpha))[:beam] for found in done]

    def _scores(self, decoder: PairDecoder, last: Array) -> Array:
        """Log-probabilities after these tokens; pad and begin are never chosen."""
        scores = decoder.step(last)
        scores[:, [self.model.config.pad, self.model.config.begin]] = -np.inf
        return scores

    def started(
        self, sources: Sequence[Sequence[int]], beam: int, extra: int = EXTRA
    ) -> tuple[PairDecoder, list[int]]:
        """A decoder that has encoded the sources, and the length limit of each target.

        Raises LamaError for an empty source or one that is too long.
        """
        c = self.model.config
        longest = max(map(len, sources), default=0)
        if not 0 < longest <= c.context_length:
            got = f"{longest} tokens, context_length={c.context_length}"
            raise LamaError(f"sources must not be empty and fit context_length; got {got}")
        size, rows = bucket(longest, c.context_length), 1 << (len(sources) - 1).bit_length()
        if (key := (rows, beam, size)) not in self._decoders:
            length = min(c.context_length, size + EXTRA)
            self._decoders[key] = PairDecoder(self.model, rows, beam, size, length)
        decoder = self._decoders[key]
        unused: list[list[int]] = [[] for _ in range(rows - len(sources))]
        decoder.start(padded([*sources, *unused], size, c.pad))
        more = min(extra, EXTRA) - 1
        return decoder, [max(1, min(decoder.length, len(source) + more)) for source in sources]


def _extended(
    alive: list[Hypothesis], log_p: Array, beam: int, end: int
) -> tuple[list[Hypothesis], list[Hypothesis], list[int]]:
    """The `beam` most likely open continuations, the ended ones among the `beam` most likely, and parents.

    A parent is the index in `alive` that an open continuation extends.
    """
    totals = np.array([h.log_probability for h in alive])[:, None] + log_p
    order = np.argsort(-totals, axis=None, kind="stable")[: 2 * beam]  # half of them may be ends
    going: list[Hypothesis] = []
    ended: list[Hypothesis] = []
    parents: list[int] = []
    for rank, place in enumerate(order):
        parent, token = divmod(int(place), log_p.shape[1])
        old, total = alive[parent], float(totals.flat[place])
        if token == end:
            if rank < beam:
                ended.append(Hypothesis(old.tokens, total, True))
        elif len(going) < beam:
            going.append(Hypothesis([*old.tokens, token], total, False))
            parents.append(parent)
    return going, ended, parents


def _finished(alive: list[Hypothesis], done: list[Hypothesis], beam: int, alpha: float, limit: int) -> bool:
    """Whether no open hypothesis could score higher than the best ended one, even at its longest.

    `beam` ended ones are not enough: for a confident model, ends are second choices, each of them unlikely.
    """
    if not alive or (beam == 1 and done):
        return True
    best = max((h.score(alpha) for h in done), default=-np.inf)
    return max(h.log_probability for h in alive) / ((5 + limit + 1) / 6) ** alpha <= best


def share_exact(found: Sequence[Hypothesis], targets: Sequence[Sequence[int]]) -> float:
    """The share of hypotheses that end and equal their target."""
    right = [h.ended and h.tokens == list(target) for h, target in zip(found, targets, strict=True)]
    return sum(right) / len(right)


@dataclass(frozen=True)
class PairScore:
    """Scores of a model on pairs: the loss, and three shares of exact targets."""

    loss: float
    """Nats per token, given the true target before it."""
    forced: float
    """Share of exact targets given the true tokens, in one pass (teacher forcing)."""
    prefixes: float
    """Share of exact targets given the true tokens, token by token through the caches."""
    own: float
    """Share of exact targets given the model's own tokens."""
    answers: list[Hypothesis]
    """The model's own targets."""


def pair_score(model: Transformer, data: PairData, progress: Progress = iter) -> PairScore:
    """Evaluate `model` on the pairs in three ways, which agree once it has learned them."""
    searcher = Searcher(model)
    losses: list[float] = []
    forced, prefixes = 0, 0
    for i in progress(range(0, len(data.pairs), BATCH)):
        rows = range(i, min(i + BATCH, len(data.pairs)))
        sources, inputs, wanted, weights = pair_arrays(data, rows, data.lengths, min(BATCH, len(data.pairs)))
        counted = weights > 0
        log_p = model(Tensor(sources), Tensor(inputs)).float().log_softmax(-1).numpy()  # (B, T, V)
        losses += list(-np.take_along_axis(log_p, wanted[..., None], -1)[..., 0][counted])
        forced += _exact_rows(log_p.argmax(-1), wanted, counted)
        decoder, _ = searcher.started([data.sources[row] for row in rows], 1)
        tokens = np.full((decoder.rows, inputs.shape[1]), model.config.pad, np.int32)
        tokens[: len(rows)] = inputs[: len(rows)]
        steps = [decoder.step(tokens[:, t]).argmax(-1) for t in range(tokens.shape[1])]
        prefixes += _exact_rows(np.stack(steps, -1)[: len(rows)], wanted[: len(rows)], counted[: len(rows)])
    found = searcher.answers(data.sources)
    n, own = len(data.pairs), share_exact(found, data.targets)
    return PairScore(float(np.mean(losses)), forced / n, prefixes / n, own, found)


def _exact_rows(predicted: Array, wanted: Array, counted: Array) -> int:
    """The number of rows that are right wherever `counted`; rows of padding alone do not count."""
    return int(((predicted == wanted) | ~counted).all(-1)[counted.any(-1)].sum())
