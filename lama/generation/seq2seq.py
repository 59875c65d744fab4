"""From source tokens to target tokens with an encoder-decoder: greedy, or the best that a beam finds."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor, UOp, dtypes
from tinygrad.device import Buffer

from lama.data.pairs import PairData, pair_arrays
from lama.errors import LamaError, UsageError
from lama.generation.decoder import bucket
from lama.jit import Input, capture_at_once
from lama.kernels.plan import buffer_of
from lama.models.transformer import Transformer

EXTRA = 50
"""A target has at most so many tokens more than its source. Source: Vaswani et al. 2017, section 6.1."""


@dataclass(frozen=True)
class Hypothesis:
    """A target as far as it has been written."""

    tokens: list[int]
    """Without begin and end."""
    log_probability: float
    """Of the tokens, and of the end where it has come; nats."""
    ended: bool
    """Whether it ends with the end token; otherwise there was no room for more."""

    def score(self, alpha: float) -> float:
        """What a beam ranks by: log P / ((5 + n) / 6)^α, n tokens with the end's. Source: Wu et al. 2016, eq. 14."""
        return self.log_probability / ((5 + len(self.tokens) + self.ended) / 6) ** alpha


class PairDecoder:
    """Encodes sources of one padded length, then takes their targets a token at a time.

    Every source has `beam` rows, one after the other, which share its encoding. What cross-attention makes of the memory
    is computed once for a batch of sources, what self-attention makes of a token once for that token.
    """

    def __init__(self, model: Transformer, n_sources: int, beam: int, source_length: int, length: int, jit: bool = True):
        self.model, self.beam, self.length, self.position = model, beam, length, 0
        rows, c = n_sources * beam, model.config
        self.rows = rows
        self._device = str(model.embed.weight.device)
        self.cache = model.new_cache(rows, length)
        shape = (rows, c.n_heads, source_length, c.d_model // c.n_heads)
        blank = Tensor.zeros(*shape, dtype=model.embed.weight.dtype, device=self._device)
        self._memory = [(blank.contiguous().clone(), blank.contiguous().clone()) for _ in range(c.n_decoder_layers)]
        self._mask = Tensor.zeros(rows, 1, 1, source_length, dtype=dtypes.bool, device=self._device).contiguous()
        Tensor.realize(self._mask, *(t for pair in self._memory for t in pair))
        capture: Callable[..., Callable[..., Tensor]] = capture_at_once if jit else (lambda step: step)
        self._encode, self._decode = capture(self._encode_step), capture(self._decode_step)
        self._sources, self._tokens = Input(self._device), Input(self._device)

    def start(self, sources: np.ndarray) -> None:
        """Read sources (n_sources, source_length); the targets begin again."""
        self._encode(self._sources(sources.astype(np.int32)))
        self.position = 0

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """One more token for each row, `tokens` (rows,); the log-probabilities (rows, vocab_size) of the token after it, float64.

        Raises LamaError for logits that are not numbers.
        """
        position = UOp.variable("position", 0, self.length - 1).bind(self.position)
        logits = self._decode(self._tokens(tokens.astype(np.int32).reshape(-1, 1)), position).numpy().astype(np.float64)
        if not np.isfinite(logits).all():
            raise LamaError(f"logits must be finite; got {logits.min()} to {logits.max()} at token {self.position}")
        self.position += 1
        logits -= logits.max(-1, keepdims=True)
        log_p: np.ndarray = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return log_p

    def choose(self, rows: np.ndarray) -> None:
        """Go on with the targets of `rows` (rows,) in place of those there: row i becomes what row rows[i] is."""
        if (rows == np.arange(len(rows))).all():
            return
        for t in (*self.cache.keys, *self.cache.values):
            buffer = buffer_of(t)
            chosen = np.frombuffer(buffer.as_memoryview(), np.uint8).reshape(len(rows), -1)[rows]  # a copy: written over just now
            buffer.copy_from(Buffer("PYTHON", buffer.size, buffer.dtype, opaque=chosen.reshape(-1).data))

    def _encode_step(self, sources: Tensor) -> Tensor:
        memory, mask = self.model.encode(sources)
        old = [self._mask, *(t for pair in self._memory for t in pair)]
        new = [mask, *(t for pair in self.model.keys_values(memory) for t in pair)]
        Tensor.realize(*(a.assign(b.repeat_interleave(self.beam, 0).cast(a.dtype)) for a, b in zip(old, new, strict=True)))
        return self._mask

    def _decode_step(self, tokens: Tensor, position: UOp) -> Tensor:
        x = self.model.decode(tokens, self._memory, self._mask, self.cache, position)
        return self.model.logits(x).squeeze(1).cast(dtypes.float32).realize()


class Searcher:
    """Finds targets for sources, each a list of token ids that ends in the model's end token; keeps what it has compiled."""

    def __init__(self, model: Transformer, jit: bool = True):
        self.model, self.jit = model, jit
        self._decoders: dict[tuple[int, int, int], PairDecoder] = {}

    def greedy(self, sources: Sequence[Sequence[int]], extra: int = EXTRA) -> list[Hypothesis]:
        """For each source the likeliest next token, again and again, up to the end token or `extra` tokens more than the source's."""
        c, n = self.model.config, len(sources)
        decoder, limits = self.started(sources, 1, extra)
        rows = decoder.rows
        targets: list[list[int]] = [[] for _ in range(n)]
        log_p, ended, last = np.zeros(n), np.zeros(n, bool), np.full(rows, c.begin)
        while decoder.position < decoder.length:
            scores = self._scores(decoder, last)[:n]
            last = np.full(rows, c.pad)
            for i in range(n):
                if ended[i] or len(targets[i]) == limits[i]:
                    continue
                last[i] = token = int(scores[i].argmax())
                log_p[i] += scores[i, token]
                ended[i] = token == c.end
                if not ended[i]:
                    targets[i].append(token)
            if all(ended[i] or len(targets[i]) == limits[i] for i in range(n)):
                break
        return [Hypothesis(targets[i], float(log_p[i]), bool(ended[i])) for i in range(n)]

    def beam(self, sources: Sequence[Sequence[int]], beam: int = 4, alpha: float = 0.6, extra: int = EXTRA) -> list[list[Hypothesis]]:
        """For each source up to `beam` targets, the best score first.

        Every step keeps the `beam` likeliest continuations of a source; one that ends is put aside, and when none of the others
        could score higher than the best of those, the source is done. A beam of 1 is greedy. Raises UsageError.
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
                alive[i], ended, parents = _extended(alive[i], scores[first : first + len(alive[i])], beam, c.end)
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

    def _scores(self, decoder: PairDecoder, last: np.ndarray) -> np.ndarray:
        """The log-probabilities after these tokens; no target has a pad or a begin in it."""
        scores = decoder.step(last)
        scores[:, [self.model.config.pad, self.model.config.begin]] = -np.inf
        return scores

    def started(self, sources: Sequence[Sequence[int]], beam: int, extra: int) -> tuple[PairDecoder, list[int]]:
        """A decoder that has read the sources, and the most tokens of each target. Raises LamaError for a source that is too long."""
        c = self.model.config
        longest = max(map(len, sources), default=0)
        if not 0 < longest <= c.context_length:
            raise LamaError(f"sources must be there and fit context_length; got {longest} tokens, context_length={c.context_length}")
        size, rows = bucket(longest, c.context_length), 1 << (len(sources) - 1).bit_length()
        if (key := (rows, beam, size)) not in self._decoders:
            length = min(c.context_length, size + EXTRA)
            self._decoders[key] = PairDecoder(self.model, rows, beam, size, length, self.jit)
        decoder = self._decoders[key]
        padded = np.full((rows, size), c.pad, np.int32)
        for i, source in enumerate(sources):
            padded[i, : len(source)] = source
        decoder.start(padded)
        return decoder, [max(1, min(decoder.length, len(source) - 1 + min(extra, EXTRA))) for source in sources]


def _extended(alive: list[Hypothesis], log_p: np.ndarray, beam: int, end: int) -> tuple[list[Hypothesis], list[Hypothesis], list[int]]:
    """The `beam` likeliest continuations that have not ended, those among the `beam` likeliest of all that have, and which of
    `alive` each of the first continues. log_p is (len(alive), vocab_size)."""
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
    """Whether none that is alive could score higher than the best that is done, even at its longest.

    That `beam` are done is not enough: where the model is sure, their second choices are ends, each of them unlikely.
    """
    if not alive or (beam == 1 and done):
        return True
    best = max((h.score(alpha) for h in done), default=-np.inf)
    return max(h.log_probability for h in alive) / ((5 + limit + 1) / 6) ** alpha <= best


Progress = Callable[[Sequence[int]], Iterable[int]]
BATCH = 64  # sources at a time


def answers(
    model: Transformer, sources: Sequence[Sequence[int]], searcher: Searcher | None = None, progress: Progress = lambda batches: batches
) -> list[Hypothesis]:
    """The greedy targets of any number of sources; `progress` goes round the numbers of the batches."""
    searcher = searcher or Searcher(model)
    return [found for i in progress(range(0, len(sources), BATCH)) for found in searcher.greedy(sources[i : i + BATCH])]


def share_exact(found: Sequence[Hypothesis], targets: Sequence[Sequence[int]]) -> float:
    """The share of hypotheses that end and are exactly their target."""
    return sum(h.ended and h.tokens == list(target) for h, target in zip(found, targets, strict=True)) / len(found)


@dataclass(frozen=True)
class PairScore:
    """How a model answers pairs; the last three are shares of exact targets, their end counted."""

    loss: float
    """Nats per token, with the true target before it."""
    forced: float
    """With the true target before it, in one pass."""
    prefixes: float
    """Token by token through the caches, on the true target."""
    own: float
    """Token by token through the caches, on what it wrote itself."""
    answers: list[Hypothesis]
    """What it wrote itself."""


def pair_score(model: Transformer, data: PairData, progress: Progress = lambda batches: batches) -> PairScore:
    """Let `model` answer the pairs in three ways that agree where it has learned them."""
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
        decoder, _ = searcher.started([data.sources[row] for row in rows], 1, EXTRA)
        tokens = np.full((decoder.rows, inputs.shape[1]), model.config.pad, np.int32)
        tokens[: len(rows)] = inputs[: len(rows)]
        steps = [decoder.step(tokens[:, t]).argmax(-1) for t in range(tokens.shape[1])]
        prefixes += _exact_rows(np.stack(steps, -1)[: len(rows)], wanted[: len(rows)], counted[: len(rows)])
    found = answers(model, data.sources, searcher)
    n = len(data.pairs)
    return PairScore(float(np.mean(losses)), forced / n, prefixes / n, share_exact(found, data.targets), found)


def _exact_rows(predicted: np.ndarray, wanted: np.ndarray, counted: np.ndarray) -> int:
    """How many rows are right at every place that counts; rows of nothing but padding are not among them."""
    return int(((predicted == wanted) | ~counted).all(-1)[counted.any(-1)].sum())
