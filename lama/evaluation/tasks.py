"""Benchmarks of contexts and endings, zero-shot, as EleutherAI's lm-evaluation-harness scores them.

Source: https://github.com/EleutherAI/lm-evaluation-harness, tasks hellaswag and lambada_openai (version 1).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lama.data.inputs import check_tokens
from lama.errors import LamaError, UsageError, quoted
from lama.evaluation.likelihood import Progress, Row, checked_context, score, unwatched
from lama.files import checked, field, parse_json, quoted_path, read_file
from lama.models.protocol import CausalLM
from lama.tokenizers import Tokenizer, encode_inside


@dataclass(frozen=True)
class BenchmarkItem:
    """A context, the endings to score after it and a space, and the index of the right one."""

    context: str
    endings: tuple[str, ...]
    label: int
    where: str
    """For messages: `line 3 of hellaswag_val.jsonl`."""


@dataclass(frozen=True)
class Answer:
    """A model's scores of one ending."""

    log_prob: float
    """Σ log p over its tokens, nats."""
    greedy: bool
    """True if every token is the likeliest one."""


Answers = Sequence[Sequence[Answer]]  # by example, then by ending


@dataclass(frozen=True)
class Task:
    """A benchmark: how its file is read and its answers are scored."""

    parse: Callable[[Mapping[str, object], str], BenchmarkItem]
    """Reads the JSON object of a line. Raises LamaError for another form."""
    metrics: Callable[[Sequence[BenchmarkItem], Answers], dict[str, float]]
    """Computes the metrics; accuracies are between 0 and 1."""
    protocol: str


@dataclass(frozen=True)
class TaskScore:
    """A model's result on a benchmark."""

    examples: int
    cut: int
    """Examples whose context was shortened at its beginning to fit."""
    metrics: dict[str, float]

    def standard_error(self, metric: str) -> float | None:
        """√(p (1 − p) / (n − 1)) for an accuracy p; None for a single example."""
        p = self.metrics[metric]
        return math.sqrt(p * (1 - p) / (self.examples - 1)) if self.examples > 1 else None


# --- HellaSwag


def parse_hellaswag(fields: Mapping[str, object], where: str) -> BenchmarkItem:
    """Activity and context, and four endings, worded as in the harness. Source: Zellers et al. 2019."""
    activity, first, last = (field(fields, key, str, where) for key in ("activity_label", "ctx_a", "ctx_b"))
    endings = field(fields, "endings", list, where)
    if len(endings) < 2 or not all(isinstance(ending, str) for ending in endings):
        raise LamaError(f"endings must be a list of two texts or more; got {quoted(endings, 60)} on {where}")
    label = fields.get("label")
    if isinstance(label, str) and re.fullmatch("[0-9]{1,9}", label):  # as in the copy on the Hugging Face hub
        label = int(label)
    if label in (None, ""):
        advice = "The test split has none: use hellaswag_val.jsonl"
        raise LamaError(f"an example must have a label; got none on {where}. {advice}")
    if type(label) is not int or not 0 <= label < len(endings):
        rule = f"the index of the right ending, 0 to {len(endings) - 1}"
        raise LamaError(f"label must be {rule}; got label={quoted(label)} on {where}")
    context = f"{activity}: {first} {last.capitalize()}"
    return BenchmarkItem(without_markup(context), tuple(map(without_markup, endings)), label, where)


def without_markup(text: str) -> str:
    """Remove WikiHow's marks: `Wash it [title] Dry it. [step] Rest.` gives `Wash it. Dry it. Rest.`"""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag_metrics(examples: Sequence[BenchmarkItem], answers: Answers) -> dict[str, float]:
    """acc: the right ending has the highest Σ log p; acc_norm: the highest Σ log p per character."""
    right = {"acc": 0, "acc_norm": 0}
    for example, given in zip(examples, answers, strict=True):
        totals = [answer.log_prob for answer in given]
        pairs = zip(totals, example.endings, strict=True)
        means = [total / len(ending) if ending else -math.inf for total, ending in pairs]
        for metric, values in (("acc", totals), ("acc_norm", means)):
            right[metric] += values.index(max(values)) == example.label
    return {metric: n / len(examples) for metric, n in right.items()}


# --- LAMBADA


def parse_lambada(fields: Mapping[str, object], where: str) -> BenchmarkItem:
    """A passage up to its last space, and its last word. Source: Paperno et al. 2016, OpenAI's version."""
    context, _, word = field(fields, "text", str, where).rpartition(" ")
    if not context or not word:
        got = f"{quoted(fields['text'], 60)} on {where}"
        raise LamaError(f"a passage must be words with spaces between them; got {got}")
    return BenchmarkItem(context, (word,), 0, where)


def lambada_metrics(examples: Sequence[BenchmarkItem], answers: Answers) -> dict[str, float]:
    """acc: every token of the last word is the likeliest; perplexity: exp(mean of −log p(last word))."""
    mean = math.fsum(answer.log_prob for (answer,) in answers) / len(answers)
    return {
        "acc": sum(answer.greedy for (answer,) in answers) / len(answers),
        "perplexity": math.exp(-mean) if mean > -709 else math.inf,
    }


TASKS = {
    "hellaswag": Task(
        parse_hellaswag,
        hellaswag_metrics,
        "lm-evaluation-harness, hellaswag, zero-shot: activity and context without WikiHow's marks; acc by "
        "the summed log-likelihood of each ending, acc_norm by that per character",
    ),
    "lambada": Task(
        parse_lambada,
        lambada_metrics,
        "lm-evaluation-harness, lambada_openai, zero-shot: the last word after the rest; acc if all its "
        "tokens are the likeliest, perplexity of whole words, no stop-word filter",
    ),
}

# --- reading and running


def read_examples(task: Task, path: Path, limit: int | None = None) -> list[BenchmarkItem]:
    """Read the (first `limit`) examples of a JSON-lines file. Raises LamaError naming file and line."""
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1; got {limit}")
    examples: list[BenchmarkItem] = []
    source = quoted_path(path)
    for number, line in enumerate(read_file(path).split(b"\n"), 1):
        if len(examples) == limit:
            break
        if line.strip():
            where = f"line {number} of {source}"
            examples.append(task.parse(checked(parse_json(line, where), dict, where), where))
    if not examples:
        raise LamaError(f"data must hold at least one example; got an empty file, {source}")
    return examples


def evaluate(
    task: Task,
    model: CausalLM,
    tokenizer: Tokenizer,
    examples: Sequence[BenchmarkItem],
    context_length: int | None = None,
    progress: Progress = unwatched,
) -> TaskScore:
    """Score every ending of every example; contexts that do not fit are cut on the left, as in the harness.

    `progress` wraps the endings' scores. Raises LamaError for an ending that does not fit by itself.
    """
    context_length = checked_context(model, context_length, least=1)
    rows, cut = [], set()
    for example in examples:
        for ending in example.endings:
            context, scored = encode_pair(tokenizer, example, ending)
            check_tokens(tokenizer, [*context, *scored], model.config.vocab_size)
            if len(scored) > context_length:
                sizes = f"{len(scored)} tokens on {example.where}, context_length={context_length}"
                raise LamaError(f"an ending must fit context_length; got {sizes}")
            if len(context) + len(scored) > context_length + 1:
                cut.add(example.where)
            # The last token is not an input: one more token fits.
            rows.append(Row([*context, *scored][-(context_length + 1) :], len(scored)))
    answers: dict[int, Answer] = {}
    for scores in progress(score(model, rows), len(rows)):
        answers[scores.index] = Answer(math.fsum(scores.log_probs.tolist()), bool(scores.greedy.all()))
    in_order = (answers[i] for i in range(len(rows)))
    grouped = [list(islice(in_order, len(example.endings))) for example in examples]
    return TaskScore(len(examples), len(cut), task.metrics(examples, grouped))


def encode_pair(tokenizer: Tokenizer, example: BenchmarkItem, ending: str) -> tuple[list[int], list[int]]:
    """Encode context and ending as one text; returns the tokens of both parts.

    White space between them goes to the ending: byte-pair tokenizers put it before the next word.
    """
    context = example.context.rstrip()
    try:
        whole = encode_inside(tokenizer, f"{example.context} {ending}")
        start = encode_inside(tokenizer, context)
    except LamaError as error:
        raise LamaError(f"{example.where}: {error}") from None
    if not 0 < len(start) < len(whole):
        got = f"{context!r:.40} and {ending!r:.40} on {example.where}"
        raise LamaError(f"an example must have a context and endings; got {got}")
    return start, whole[len(start) :]
