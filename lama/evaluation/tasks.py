"""Benchmarks of context and endings, scored as EleutherAI's lm-evaluation-harness scores them, zero-shot.

Source: https://github.com/EleutherAI/lm-evaluation-harness, tasks hellaswag (version 1) and lambada_openai (version 1).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lama.data.inputs import check_tokens
from lama.errors import LamaError, UsageError, quoted
from lama.evaluation.likelihood import Progress, Row, score, unwatched
from lama.files import checked, field, parse_json, quoted_path, read_file
from lama.models.gpt import GPT
from lama.tokenizers import Tokenizer, encode_inside


@dataclass(frozen=True)
class Example:
    """A context, the endings to score after it (a space goes between), and which of them is right."""

    context: str
    endings: tuple[str, ...]
    label: int
    where: str
    """For messages: `line 3 of hellaswag_val.jsonl`."""


@dataclass(frozen=True)
class Answer:
    """What a model makes of one ending."""

    log_prob: float
    """Σ log p over its tokens, nats."""
    greedy: bool
    """Every token of it is the likeliest one."""


Answers = Sequence[Sequence[Answer]]  # one for each ending of each example


@dataclass(frozen=True)
class Task:
    """How a benchmark is read and judged."""

    parse: Callable[[Mapping[str, Any], str], Example]
    """An example from a line's JSON object; raises LamaError for one that is not of the task's form."""
    judge: Callable[[Sequence[Example], Answers], dict[str, float]]
    """The metrics, accuracies between 0 and 1."""
    protocol: str


@dataclass(frozen=True)
class TaskScore:
    """A model's result."""

    examples: int
    cut: int
    """Examples whose context lost its beginning because it did not fit."""
    metrics: dict[str, float]

    def standard_error(self, metric: str) -> float | None:
        """√(p (1 − p) / (n − 1)), of an accuracy p; None for a single example."""
        p = self.metrics[metric]
        return math.sqrt(p * (1 - p) / (self.examples - 1)) if self.examples > 1 else None


# --- HellaSwag


def parse_hellaswag(fields: Mapping[str, Any], where: str) -> Example:
    """The activity and the context, and four endings. Source: Zellers et al. 2019; the wording is the harness's."""
    texts = {key: field(fields, key, str, where) for key in ("activity_label", "ctx_a", "ctx_b")}
    endings = field(fields, "endings", list, where)
    if len(endings) < 2 or not all(isinstance(ending, str) for ending in endings):
        raise LamaError(f"endings must be a list of two texts or more; got {quoted(endings, 60)} on {where}")
    label = fields.get("label")
    if isinstance(label, str) and re.fullmatch("[0-9]{1,9}", label):  # as in the copy on the Hugging Face hub
        label = int(label)
    if label in (None, ""):
        raise LamaError(f"an example must have a label; got none on {where}. The test split has none: use hellaswag_val.jsonl")
    if type(label) is not int or not 0 <= label < len(endings):
        raise LamaError(f"label must be the place of the right ending, 0 to {len(endings) - 1}; got label={quoted(label)} on {where}")
    context = f"{texts['activity_label']}: {texts['ctx_a']} {texts['ctx_b'].capitalize()}"
    return Example(without_markup(context), tuple(map(without_markup, endings)), label, where)


def without_markup(text: str) -> str:
    """Without the marks that WikiHow left: `"Wash it [title] Dry it. [step] Use a towel."` gives `"Wash it. Dry it. Use a towel."`."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def judge_hellaswag(examples: Sequence[Example], answers: Answers) -> dict[str, float]:
    """acc: the right ending has the highest Σ log p; acc_norm: the highest Σ log p for each of its characters."""
    right = {"acc": 0, "acc_norm": 0}
    for example, of_endings in zip(examples, answers, strict=True):
        totals = [answer.log_prob for answer in of_endings]
        means = [total / len(ending) if ending else -math.inf for total, ending in zip(totals, example.endings, strict=True)]
        for metric, values in (("acc", totals), ("acc_norm", means)):
            right[metric] += values.index(max(values)) == example.label
    return {metric: n / len(examples) for metric, n in right.items()}


# --- LAMBADA


def parse_lambada(fields: Mapping[str, Any], where: str) -> Example:
    """A passage up to its last space, and the word after it. Source: Paperno et al. 2016, in OpenAI's version."""
    context, _, word = field(fields, "text", str, where).rpartition(" ")
    if not context or not word:
        raise LamaError(f"a passage must be words with spaces between them; got {quoted(fields['text'], 60)} on {where}")
    return Example(context, (word,), 0, where)


def judge_lambada(examples: Sequence[Example], answers: Answers) -> dict[str, float]:
    """acc: every token of the last word is the likeliest; perplexity: exp(mean of −log p(last word))."""
    mean = math.fsum(answer.log_prob for (answer,) in answers) / len(answers)
    return {
        "acc": sum(answer.greedy for (answer,) in answers) / len(answers),
        "perplexity": math.exp(-mean) if mean > -709 else math.inf,
    }


TASKS = {
    "hellaswag": Task(
        parse_hellaswag,
        judge_hellaswag,
        "lm-evaluation-harness, hellaswag, zero-shot: activity and context, WikiHow's marks taken out; acc by the summed "
        "log-likelihood of each ending, acc_norm by that for each character",
    ),
    "lambada": Task(
        parse_lambada,
        judge_lambada,
        "lm-evaluation-harness, lambada_openai, zero-shot: the last word after the rest; acc if all its tokens are the likeliest, "
        "perplexity of whole words, no stop-word filter",
    ),
}

# --- reading and running


def read_examples(task: Task, path: Path, limit: int | None = None) -> list[Example]:
    """The examples of a JSON-lines file, or the first `limit` of them. Raises LamaError naming file and line."""
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1; got {limit}")
    examples: list[Example] = []
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
    model: GPT,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    context_length: int | None = None,
    progress: Progress = unwatched,
) -> TaskScore:
    """Score every ending of every example. A context that does not fit loses its beginning, as in the harness.

    `progress` may watch the endings as they come. Raises LamaError for an ending that does not fit by itself.
    """
    longest = model.config.context_length
    context_length = longest if context_length is None else context_length
    if not 1 <= context_length <= longest:
        raise UsageError(f"context_length must be at least 1 and at most the model's {longest}; got {context_length}")
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
            # The last token is only scored, never fed: one more fits.
            rows.append(Row([*context, *scored][-(context_length + 1) :], len(scored)))
    answers: list[Answer | None] = [None] * len(rows)
    for scores in progress(score(model, rows), len(rows)):
        answers[scores.index] = Answer(math.fsum(scores.log_probs.tolist()), bool(scores.greedy.all()))
    in_order = iter(answer for answer in answers if answer is not None)
    return TaskScore(len(examples), len(cut), task.judge(examples, [[next(in_order) for _ in example.endings] for example in examples]))


def encode_pair(tokenizer: Tokenizer, example: Example, ending: str) -> tuple[list[int], list[int]]:
    """The tokens of the context and those of the ending with the space before it, as both are spelled together.

    White space at the end of the context goes to the ending: byte-pair tokenizers put it before the word that follows.
    """
    context = example.context.rstrip()
    try:
        whole, start = encode_inside(tokenizer, f"{example.context} {ending}"), encode_inside(tokenizer, context)
    except LamaError as error:
        raise LamaError(f"{example.where}: {error}") from None
    if not 0 < len(start) < len(whole):
        raise LamaError(f"an example must have a context and endings; got {context!r:.40} and {ending!r:.40} on {example.where}")
    return start, whole[len(start) :]
