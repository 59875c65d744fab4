"""Tasks of EleutherAI's lm-evaluation-harness, scored in this process through its model interface.

Source: https://github.com/EleutherAI/lm-evaluation-harness, lm_eval/api/model.py and models/huggingface.py.
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lama.errors import LamaError, UsageError, first_line, quoted
from lama.evaluation.likelihood import Progress, Row, checked_context, score, unwatched
from lama.models.protocol import CausalLM
from lama.tokenizers import Tokenizer, encode_inside
from lama.tokenizers.base import TableTokenizer

Answer = Callable[[Sequence[int], Mapping[str, Any]], str]
"""A function that continues tokens, with the harness's options: `until`, `max_gen_toks`, ..."""
BOOTSTRAP = 1000  # samples for the standard errors of metrics that are not means
NEW_TOKENS = 256  # of an answer, unless a task sets another number


def lm_eval(module: str = "") -> Any:
    """The harness, or a module of it. Raises LamaError where it is not installed."""
    try:
        return importlib.import_module(f"lm_eval{module}")
    except ImportError as error:
        raise LamaError(f"lm_eval is not installed ({first_line(error)}). Run: pip install lm_eval") from None


def run_harness(
    model: CausalLM,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    answer: Answer,
    *,
    include: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    context_length: int | None = None,
    progress: Progress = unwatched,
) -> dict[str, dict[str, float]]:
    """The metrics of each task, with their standard errors under names that end in `_stderr`.

    `include` is a folder with more tasks. `limit` takes the first items of each task, `shots` are examples
    before each item. Raises LamaError for an unknown task, and for data that cannot be loaded.
    """
    manager = _manager(tasks, include)
    lm = harness_model(model, tokenizer, answer, context_length, progress)
    options = {"tasks": list(tasks), "task_manager": manager, "limit": limit, "num_fewshot": shots}
    try:
        found = lm_eval().simple_evaluate(model=lm, bootstrap_iters=BOOTSTRAP, **options)
    except LamaError:
        raise
    except Exception as error:  # of its libraries, each of its own kind
        named = quoted(", ".join(tasks), plain=True)
        raise LamaError(f"the harness cannot run {named}: {first_line(error)}") from error
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and name != "sample_len"
        }
        for task, metrics in found["results"].items()
    }


def _manager(tasks: Sequence[str], include: Path | None) -> Any:
    """The harness's index of tasks. Its own tasks take seconds to find, and are listed only if needed."""
    place, missing = None if include is None else str(include), list(tasks)
    for defaults in (False, True):
        manager = lm_eval(".tasks").TaskManager(include_path=place, include_defaults=defaults)
        missing = [name for name in tasks if not manager.match_tasks([name])]
        if not missing:
            return manager
    raise UsageError(f"a task must be one of the harness or of --include; got {quoted(missing[0])}")


def harness_model(
    model: CausalLM,
    tokenizer: Tokenizer,
    answer: Answer,
    context_length: int | None = None,
    progress: Progress = unwatched,
) -> Any:
    """The model as an object of the harness, with scores as `lama.evaluation.likelihood` computes them."""
    most = checked_context(model, context_length, least=1)
    begin = list(tokenizer.frame[0]) if isinstance(tokenizer, TableTokenizer) else []
    prefix = next(iter(begin), tokenizer.end_of_text)
    if prefix is None:
        raise LamaError("a tokenizer must have an end of text for the harness; got none")
    utils, base = lm_eval(".utils"), lm_eval(".api.model").TemplateLM

    class LamaLM(base):  # type: ignore[misc,valid-type]
        """lama's model behind the harness's interface."""

        eot_token_id = tokenizer.end_of_text
        prefix_token_id = prefix

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
            ids = encode_inside(tokenizer, string)
            return ids if add_special_tokens is False else [*begin, *ids]

        def _loglikelihood_tokens(self, requests: Any, **_: object) -> list[tuple[float, bool]]:
            rows = []
            for (_context, ending), context, scored in requests:
                if not 0 < len(scored) <= most:
                    got = f"{len(scored)} tokens in {quoted(ending, 40)}, context_length={most}"
                    raise LamaError(f"an ending must have tokens that fit the context; got {got}")
                rows.append(Row([*context, *scored][-(most + 1) :], len(scored)))
            found = [(0.0, False)] * len(rows)
            for each in progress(score(model, rows), len(rows)):
                found[each.index] = math.fsum(each.log_probs.tolist()), bool(each.greedy.all())
            return found

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            windows: list[tuple[tuple[str, str], list[int], list[int]]] = []
            owners = []
            for i, request in enumerate(requests):
                text = request.args[0]
                shape = {"prefix_token": prefix, "max_seq_len": most, "context_len": 1}
                parts = utils.get_rolling_token_windows(token_list=self.tok_encode(text), **shape)
                for part in parts:
                    windows.append((("", text), *utils.make_disjoint_window(part)))
                    owners.append(i)
            totals = [0.0] * len(requests)
            for i, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
                totals[i] += total
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            answers = []
            for request in requests:
                context, options = request.args
                options = {"max_gen_toks": NEW_TOKENS, "temperature": 0.0, **options}
                if not options.get("do_sample", options["temperature"] > 0):
                    options["temperature"] = 0.0
                room = most - int(options["max_gen_toks"])
                if room < 1:
                    got = f"max_gen_toks={options['max_gen_toks']}, context_length={most}"
                    raise LamaError(f"an answer must leave room for its question; got {got}")
                answers.append(answer(self.tok_encode(context)[-room:], options))
            return answers

    return LamaLM()
