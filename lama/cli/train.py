"""Train a GPT, a BERT, an encoder-decoder or a classifier.

Train a model, compare it with simple baselines on held-out data, and save it. A GPT (the default) learns to
continue a text, for `lama generate`; the default text is the King James Bible. A BERT learns to predict
masked tokens, for `lama fill`. An encoder-decoder (seq2seq) learns pairs of texts, for `lama translate`, and
a classifier labelled texts, for `lama classify predict`. Settings come from a preset or a file, and each can
be given here. Ctrl-C finishes the step, saves a checkpoint and prints the resume command. Exits with 1 if the
model is no better than the baselines.
"""

import argparse
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lama.cli import AddVerb, training
from lama.cli.live import heading
from lama.cli.settings import add_settings, flag_of, show
from lama.errors import LamaError, note
from lama.tables import metric_table
from lama.training.settings import MODELS, presets
from lama.training.settings.scale import CHOSEN, RATIO

if TYPE_CHECKING:
    from lama.training.loop import Step
    from lama.training.run import Run
    from lama.training.session import Evaluation
    from lama.training.settings import RunConfig

SAMPLE_TOKENS = 160


def add_parser(add_verb: AddVerb) -> None:
    usage = "%(prog)s [PRESET | FILE.toml] [--model MODEL] [options] [settings]"
    parser = add_verb("train", training.run, __doc__, usage=usage)
    add = parser.add
    names = {model: ", ".join(presets(model)) for model in MODELS}
    settings = (
        f"for a GPT {names['gpt']}; for seq2seq {names['seq2seq']}, or a file with source, tab and target "
        f"in each line; for a classifier {names['classifier']}, or a file with label, tab and text in each "
        "line, or .csv with the columns text and label; or a .toml file, such as a run's settings.toml"
    )
    add("settings PRESET", settings, nargs="?")
    add("--model", "kind of model (default gpt, or that of FILE.toml)", choices=MODELS)
    training.add_options(parser, "out/ and the preset's, the data's or the model's name")
    size = "choose depth, width, heads, rate, decay, batch and steps of a GPT for N parameters, such as 10M"
    add("--size N", size)
    add("--depth N", "the same for N blocks, each of which makes the model 64 wider", type=int)
    add("--ratio X", f"of --size and --depth: tokens for each parameter (default {RATIO:g})", type=float)
    add("-v, --verbose", "explain each stage on the real data as it goes")
    about = "in a file: the same names with _ for -, and initial for --from"
    add_settings(parser, *MODELS, about=about)


def introduce(session: "Run", args: argparse.Namespace) -> None:
    from lama.data import batch
    from lama.models.registry import describe

    config, model, tokenizer, tokens = session.config, session.model, session.tokenizer, session.tokens
    heading(f"The corpus: {tokens.corpus['name']}")
    if args.verbose and session.corpus:
        from lama.interp import walkthrough

        print(walkthrough.explain_corpus(session.corpus, tokenizer, tokens.train, tokens.validation))
        inputs, targets = batch(tokens.train, 0, config.seed, 1, config.context_length)
        heading("A window of the corpus")
        print(walkthrough.explain_window(tokenizer, inputs[0], targets[0]))
        heading("Through the untrained model")
        print(walkthrough.explain_attention(model, tokenizer, inputs[0]))
        heading("The parameters")
        print(walkthrough.explain_parameters(model))
    else:
        print(f"{len(tokens.train):,} tokens for training, {len(tokens.validation):,} held out")
        print(describe(model))
    describe_training(session)
    if scale := training.scale_of(args):
        words = (f"{flag_of(name)} {show(getattr(config, name))}" for name in CHOSEN)
        seen = config.steps * config.batch_size * config.context_length
        epochs = f"{seen:,} tokens, {seen / len(tokens.train):,.2f} times the text"
        print(f"chosen for {scale}, {scale.ratio:g} tokens a parameter: {' '.join(words)}; {epochs}")

    heading("Before training")
    session.measure_start()
    print("held-out loss in nats per token (lower is better) of n-gram counts, and of this model:")
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in session.baselines.items())
    print(f"  {losses}; {'starting' if config.initial else 'untrained'} model {session.untrained:.3f}")


def describe_training(session: "Run") -> None:
    """Print an adapter's size and memory, and a note if bfloat16 gains nothing."""
    from lama.kernels.matmul import multiplies_bfloat16

    device = str(session.model.embed.weight.device)
    is_rounded = session.config.precision != "float32" and device.startswith("CPU")
    if is_rounded and not multiplies_bfloat16(device):
        note("no instruction multiplies bfloat16 here: float32 is as fast, and does not round")
    if session.config.lora:
        from lama.models.adapters import described

        print(f"adapter of {described(session.model)}\nmemory: {session.memory}")


def remark(session: "Run", step: "Step") -> str | None:
    """A sample, at the steps that are due; else None."""
    if not sample_number(session.config, step.step):
        return None
    return f"loss {step.loss:.3f}  {sample(session, prompt_of(session), SAMPLE_TOKENS)!r}"


def sample_number(config: "RunConfig", step: int) -> int:
    """The number of the sample that is due after a step, from 1; 0 if none is."""
    every = config.sample_every or max(1, config.steps // 4)
    return 0 if step % every or step == config.steps else step // every


def conclude(session: "Run", last: "Evaluation | None") -> None:
    """Print a sample and the losses. Raises LamaError for a model that is no better than a bigram."""
    config, prompt = session.config, prompt_of(session)
    heading("Result")
    print(f"{prompt}{sample(session, prompt, 2 * SAMPLE_TOKENS)}\n")
    start, bigram = "before" if config.initial else "untrained", session.baselines.get("bigram", math.inf)
    losses = {start: session.untrained, "n-gram (2)": bigram, "trained": session.best}
    words = ["lama", "generate", "-m", str(session.folder.path), "-p", prompt.strip()]
    print_losses(session, last, losses, session.tokens_per_byte, "Continue any text with it", words)
    if not config.initial and session.best >= bigram:
        got, advice = f"got {session.best:.3f} nats per token", f"Train for more than {config.steps} steps"
        raise LamaError(f"the trained model must beat the bigram baseline; {got}. {advice}")


def print_losses(
    session: "Run",
    last: "Evaluation | None",
    losses: Mapping[str, float],
    tokens_per_byte: float | None,
    use: str,
    words: Sequence[str],
) -> None:
    """Print the losses, the model's folder and the command that uses it.

    `tokens_per_byte` converts losses of tokens to bits; None prints losses of pairs. Raises LamaError for a
    model that has not improved.
    """
    if tokens_per_byte is None:
        print(metric_table("metric", losses, ("loss of a pair", losses.values(), ".4f")))
    else:
        print(losses_table(losses, tokens_per_byte))
    best = ""
    if last and not last.best:
        best = f" (the best model; the last one has {last.validation_loss:.3f})"
    print(f"\nsaved in {session.folder.path}{best}. {use}:\n  {shlex.join(words)}")
    if session.best >= session.untrained:
        got = f"got a loss of {session.best:.4g}"
        raise LamaError(f"training must improve the model; {got}. Lower the learning rate")


def losses_table(losses: Mapping[str, float], tokens_per_byte: float) -> str:
    values = losses.values()
    bits = [loss / math.log(2) * tokens_per_byte for loss in values]
    perplexities = [f"{math.exp(loss):.2f}" if loss < 20 else "-" for loss in values]
    rows = ("bits per byte", bits, ".3f"), ("perplexity", perplexities, "")
    return metric_table("metric", losses, ("loss, nats per token", values, ".3f"), *rows)


def prompt_of(session: "Run") -> str:
    """The prompt of the samples: the beginning of the training text."""
    first = len(session.tokenizer.encode(""))  # a token such as BOS, which every prompt gets
    text = session.tokenizer.decode(session.tokens.train[first : first + 1000].tolist())
    return opening(text, session.config.context_length)


def sample(session: "Run", prompt: str, n: int) -> str:
    from lama.generation import generate

    model, tokenizer, context = session.model, session.tokenizer, session.config.context_length
    text = generate(model, tokenizer, prompt, max_new_tokens=n, window=True, context=context)
    return str(text)


def opening(text: str, context_length: int) -> str:
    """The first line of the text, cut to half a window."""
    line = next((line for line in text.splitlines() if line.strip()), text[:1])
    end = "\n" if "\n" in text else ""  # a tokenizer of the text's characters knows no others
    return line[: max(1, context_length // 2)] + end
