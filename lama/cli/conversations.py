"""Print a fine-tuning on conversations: its data, its losses and answers to held-out prompts."""

import argparse
from functools import partial
from typing import TYPE_CHECKING

from lama.cli.live import heading, progress, say
from lama.cli.train import describe_training, print_losses, sample_number

if TYPE_CHECKING:
    from lama.training.loop import Step
    from lama.training.run import Run
    from lama.training.session import Evaluation

ANSWER_TOKENS = 60
PROMPTS = 3
SHOWN = 100  # characters of a prompt


def introduce(session: "Run", args: argparse.Namespace) -> None:
    from lama.models.registry import describe
    from lama.training.preferences import PreferenceRun

    heading(f"The conversations: {session.tokens.corpus['name']}")
    print(describe_conversations(session))
    print(describe(session.model))
    describe_training(session)
    heading("Before training")
    if isinstance(session, PreferenceRun) and not session.has_reference:
        say("computing the reference's log-probabilities, once")
        session.find_reference(partial(progress, label="the reference"))
    session.measure_start()
    unit = "of a pair" if session.config.dpo else "nats per token of the assistant"
    print(f"held-out loss {session.untrained:.4f} {unit}")
    print(f"the starting model answers: {exchange(session, 0)}")


def describe_conversations(session: "Run") -> str:
    """The sizes of the training and held-out data, how full the rows are, and what was dropped."""
    from lama.data.conversations import pair_context
    from lama.training.chat import packed_rows

    tokens, config = session.tokens, session.config
    rows = packed_rows(tokens, "train", config)
    n_rows, notes = len(rows.epoch(0)), tokens.notes
    lines = []
    for part, ids in (("for training", "train"), ("held out", "validation")):
        n, counted = len(tokens.ends[ids]), int(tokens.counted[ids].sum())
        kind = f"{n // 2:,} pairs" if config.dpo else f"{n:,}"
        lines.append(f"{kind} {part}, {counted:,} tokens of the assistant")
    full = rows.lengths.sum() / (n_rows * config.context_length)
    lines.append(f"an epoch is {n_rows:,} rows of {config.context_length} tokens, {full:.0%} full")
    if notes.get("cut") or notes.get("dropped"):
        most = (pair_context(config.context_length) if config.dpo else config.context_length) + 1
        cut, dropped = notes.get("cut"), notes.get("dropped")
        lines.append(f"longer than {most} tokens: {cut} cut, {dropped} without an answer in them dropped")
    if same := notes.get("same"):
        lines.append(f"{same} pairs without two different answers dropped")
    return "\n".join(lines)


def remark(session: "Run", step: "Step") -> str | None:
    """An answer to a held-out prompt, at the steps that are due; else None."""
    if not (number := sample_number(session.config, step.step)):
        return None
    return f"loss {step.loss:.3f}  {exchange(session, number)}"


def exchange(session: "Run", number: int) -> str:
    """A held-out prompt and the model's likeliest answer."""
    from lama.training.chat import prompts

    found = list(prompts(session.tokens, PROMPTS, session.config.dpo > 0))
    prompt, _ = found[number % len(found)]
    asked = session.tokenizer.decode(prompt)
    return f"{asked[-SHOWN:]!r} -> {answer(session, prompt)!r}"


def answer(session: "Run", prompt: list[int]) -> str:
    from lama.generation import generate

    model, n = session.model, ANSWER_TOKENS
    context = min(model.config.context_length, session.config.context_length + n)
    words = generate(model, session.tokenizer, prompt, temperature=0, max_new_tokens=n, context=context)
    return str(words)


def conclude(session: "Run", last: "Evaluation | None") -> None:
    """Print answers and losses. Raises LamaError for a model that has not improved."""
    from lama.training.chat import prompts

    heading("Result")
    decode = session.tokenizer.decode
    for prompt, wanted in prompts(session.tokens, PROMPTS, session.config.dpo > 0):
        print(f"prompt  {decode(prompt)[-SHOWN:]!r}\nwanted  {decode(wanted)!r}")
        print(f"answer  {answer(session, prompt)!r}\n")
    losses = {"before": session.untrained, "trained": session.best}
    size = None if session.config.dpo else session.tokens_per_byte
    print_losses(session, last, losses, size, "Talk to it", ["lama", "chat", "-m", str(session.folder.path)])
