"""`lama train`, and `python transformer.py`: train a GPT, from scratch or from another, and generate from it."""

import argparse
import math
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from lama.errors import LamaError, UsageError
from lama.training.config import ALIASES, SETTINGS, presets, read_settings

if TYPE_CHECKING:
    from lama.data import Corpus
    from lama.models.gpt import GPT
    from lama.tokenizers import Tokenizer
    from lama.training.run import Evaluation, Run

SAMPLE_TOKENS = 160
TRACKERS = ("tensorboard", "wandb", "trackio")
FLAGS = {setting: flag for flag, setting in ALIASES.items()}  # `initial` is a bad flag, `from` a bad name in Python


def add_parser(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "train",
        help="train a GPT, from scratch or from another",
        description="Train a GPT on a text (default: the King James Bible), judge it on held-out text against n-gram models, and save it "
        "in a folder that `gpt.py -m` runs. Exits with 1 if it is not better than they are.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("settings", nargs="?", metavar="SETTINGS", help=f"a preset ({', '.join(presets())}) or a .toml file; before any flags")
    add("--out", type=Path, metavar="DIR", help="the folder of the run (default out/gpt, or out/ and the preset's name)")
    add("--resume", type=Path, metavar="DIR", help="go on with the run in DIR from its last checkpoint")
    add("--restart", action="store_true", help="begin again in a folder that holds an unfinished run, which is lost")
    add("--size", metavar="N", help="choose depth, width, heads, learning rate and batch for N parameters, such as 800K or 10M")
    add("--device", help="a tinygrad device, such as CPU, CUDA or METAL (default: tinygrad's choice)")
    add("--devices", help="train on several, each with a share of the batch: a number, or names such as CPU:0,CPU:1")
    add("--track", choices=TRACKERS, help="log to this too")
    add("-v", "--verbose", action="store_true", help="explain each stage on the real data as it goes; show tracebacks")
    group = parser.add_argument_group("settings")
    for name, field in SETTINGS.items():
        flag, kind, about = f"--{FLAGS.get(name, name).replace('_', '-')}", type(field.default), field.metadata["about"]
        options: dict[str, Any] = {"dest": name, "default": None, "help": f"{about} (default {show(field.default)})"}
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif kind is tuple:
            group.add_argument(flag, nargs="+", metavar="TEXT", **options | {"help": about})
        else:
            choices = field.metadata["choices"] or None
            group.add_argument(flag, type=kind, choices=choices, metavar=None if choices else kind.__name__.upper(), **options)


def show(value: Any) -> str:
    return "none" if value == "" else f"{value:g}" if isinstance(value, float) else str(value)


def run(args: argparse.Namespace) -> int:
    from lama.device import use_device
    from lama.training.folder import RunFolder
    from lama.training.run import new_run, resumed_run

    if args.device:
        use_device(args.device)
    given = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    if args.resume:
        for name in ("settings", "out", "size", "restart"):
            if getattr(args, name):
                raise UsageError(f"--resume takes all from the run's own folder; got {name} beside it. Leave it out")
        folder = RunFolder(args.resume)
        session = resumed_run(folder, given, command_line(args))
        heading(f"Resumed after step {session.trainer.step} of {session.config.steps}: {folder.path}")
        print(session.model.describe())
    else:
        settings = (read_settings(args.settings) if args.settings else {}) | given
        folder = RunFolder(args.out or Path("out") / (args.settings if args.settings in presets() else "gpt"))
        check_out(folder, args.restart)
        session, corpus = new_run(folder, settings, command_line(args), args.size, tokenizing)
        introduce(session, corpus, args)
    prompt = opening(session.tokenizer.decode(session.tokens.train[:1000].tolist()), session.config.context_length)
    return learn(session, prompt, args)


def introduce(session: "Run", corpus: "Corpus", args: argparse.Namespace) -> None:
    """What is trained on what, and where it starts from."""
    from lama.data import batch

    config, model, tokenizer, tokens = session.config, session.model, session.tokenizer, session.tokens
    heading(f"The corpus: {corpus.name}")
    if args.verbose:
        from lama.interp.walkthrough import explain_attention, explain_corpus, explain_parameters, explain_window

        print(explain_corpus(corpus, tokenizer, tokens.train, tokens.validation))
        inputs, targets = batch(tokens.train, 0, config.seed, 1, config.context_length)
        heading("A window of it")
        print(explain_window(tokenizer, inputs[0], targets[0]))
        heading("Through the model, before it has learned anything")
        print(explain_attention(model, tokenizer, inputs[0]))
        heading("What there is to learn")
        print(explain_parameters(model))
    else:
        print(f"{len(tokens.train):,} tokens to learn from, {len(tokens.validation):,} held out\n{model.describe()}")
    if args.size:
        print(f"chosen for {args.size} parameters: batch size {config.batch_size}, learning rate {config.learning_rate:g}")

    heading("Before training")
    session.measure_start()
    print("loss on the held-out text, in nats per token (lower is better; what counting alone gives, and this model):")
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in session.baselines.items())
    print(f"  {losses}; {'the model as it is' if config.initial else 'untrained model'} {session.untrained:.3f}")


def learn(session: "Run", prompt: str, args: argparse.Namespace) -> int:
    """Train to the end, or to Ctrl-C; say what came of it. The exit code."""
    config, folder, model, tokenizer = session.config, session.folder, session.model, session.tokenizer
    heading(f"Training: {config.steps} steps of {config.batch_size} x {config.context_length} tokens")
    with stopping(session) as received:
        last = watch(session, prompt, args)
    if received:
        name = signal.Signals(received[0]).name
        print(
            f"lama: stopped by {name} after step {session.trainer.step} of {config.steps}; go on with: "
            f"{shlex.join(['lama', 'train', '--resume', str(folder.path)])}",
            file=sys.stderr,
        )
        return 128 + received[0]

    heading("What it learned")
    print(f"{prompt}{sample(model, tokenizer, prompt, 2 * SAMPLE_TOKENS)}\n")
    bigram = session.baselines.get("bigram", math.nan)
    print(table(session.untrained, bigram, session.best, len(session.tokens.validation) / session.tokens.validation_bytes))
    again = shlex.join(["python", "gpt.py", "-m", str(folder.path), "-p", prompt.strip()])
    print(f"\nsaved in {folder.path}{best_of(last, session)}. Continue any text with it:\n  {again}")
    if not session.best < session.untrained:
        raise LamaError(f"the trained model must beat the one it began as; got {session.best:.3f} nats per token. Lower the learning rate")
    if not (config.initial or session.best < bigram):
        raise LamaError(
            f"the trained model must beat the bigram baseline; got {session.best:.3f} nats per token. "
            f"Train for more than {config.steps} steps"
        )
    return 0


def best_of(last: "Evaluation | None", session: "Run") -> str:
    if last is None or last.best:
        return ""
    return f" (the best of the run, not the last, which has {last.validation_loss:.3f})"


def watch(session: "Run", prompt: str, args: argparse.Namespace) -> "Evaluation | None":
    """Train with a live line, samples, the curve and the tracker; returns the last evaluation."""
    from tqdm import tqdm

    from lama.training.loop import Step

    config, folder = session.config, session.folder
    every = config.sample_every or max(1, config.steps // 4)
    print("compiling the training step, once; then a sample now and then", file=sys.stderr)
    tracker = make_tracker(args.track, session)
    last = None
    # The time left is the loop's own: tqdm's would count the compilation into every step.
    layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
    with tqdm(total=config.steps, initial=session.trainer.step, unit="step", file=sys.stderr, dynamic_ncols=True, bar_format=layout) as bar:
        for event in session:
            if isinstance(event, Step):
                mfu = session.mfu(event)
                bar.set_postfix_str(
                    f"loss {event.loss:.3f}, rate {event.learning_rate:.1e}, gradient {event.gradient_norm:.2f}, "
                    f"{event.tokens_per_second:,.0f} tokens/s, {'' if mfu is None else f'MFU {mfu:.0%}, '}"
                    f"{tqdm.format_interval(event.seconds_left)} left"
                )
                bar.update()
                metrics = {"loss": event.loss, "learning_rate": event.learning_rate, "gradient_norm": event.gradient_norm}
                if event.step % every == 0 and event.step < config.steps and not session.stopped:
                    bar.write(
                        f"step {event.step}: loss {event.loss:.3f}  {sample(session.model, session.tokenizer, prompt, SAMPLE_TOKENS)!r}",
                        file=sys.stdout,
                    )
                    sys.stdout.flush()
            else:
                last = event
                metrics = {"validation_loss": event.validation_loss, "bits_per_byte": event.bits_per_byte}
                bar.write(
                    f"step {event.step}: held-out loss {event.validation_loss:.4f}, {event.bits_per_byte:.4f} bits per byte"
                    f"{', the best so far' if event.best else ''}",
                    file=sys.stdout,
                )
                sys.stdout.flush()
                draw_curve(folder)
            if tracker:
                tracker.log(event.step, metrics)
    if tracker:
        tracker.close()
    return last


def make_tracker(kind: str | None, session: "Run") -> Any:
    if kind is None:
        return None
    from dataclasses import asdict

    from lama.training.trackers import open_tracker

    return open_tracker(kind, session.folder.path, session.folder.path.name, asdict(session.config))


def draw_curve(folder: Any) -> None:
    """loss.png in the run's folder, where matplotlib is installed."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        return
    from lama.checkpoints.atomic import atomic_write
    from lama.training.curve import loss_curve

    with atomic_write(folder.path / "loss.png") as file:
        file.write(loss_curve(folder.read_log()))


@contextmanager
def stopping(session: "Run") -> Iterator[list[int]]:
    """SIGINT and SIGTERM let the step under way end; a second one ends the program. Yields the signals that came."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        session.stop()
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tokenizing(pieces: Any) -> Any:
    """A progress bar over the bytes of the corpus."""
    from tqdm import tqdm

    return tqdm(pieces, unit="piece", desc="tokenizing", file=sys.stderr, dynamic_ncols=True, leave=False, delay=1)


def sample(model: "GPT", tokenizer: "Tokenizer", prompt: str, n: int) -> str:
    from lama.generation import generate

    return str(generate(model, tokenizer, prompt, max_new_tokens=n, temperature=0.8, window=True))


def opening(text: str, context_length: int) -> str:
    """The first line of the text, cut to half a window: the prompt of the samples."""
    line = next(line for line in text.splitlines() if line.strip())
    end = "\n" if "\n" in text else ""  # a tokenizer of the text's characters knows no others
    return line[: max(1, context_length // 2)] + end


def table(untrained: float, bigram: float, trained: float, tokens_per_byte: float) -> str:
    """The losses, and what they mean, side by side."""
    columns = (untrained, bigram, trained)
    rows = (
        ("loss, nats per token", [f"{loss:.3f}" for loss in columns]),
        ("bits per byte", [f"{loss / math.log(2) * tokens_per_byte:.3f}" for loss in columns]),
        ("perplexity", [f"{math.exp(loss):.2f}" if loss < 20 else "-" for loss in columns]),
    )
    lines = [f"{'metric':<22}| {'untrained':>10} | {'n-gram (2)':>10} | {'trained':>10}"]
    return "\n".join(lines + [f"{name:<22}| " + " | ".join(f"{value:>10}" for value in values) for name, values in rows])


def check_out(folder: Any, restart: bool) -> None:
    """Refuse, before hours of training, an --out that cannot be written, that holds something else, or an unfinished run."""
    from lama.cli.out import check_folder

    check_folder(folder.path, ("config.json", "settings.toml"), "a run of lama train")
    if restart or not folder.settings_file.exists() or not (found := folder.checkpoints()):
        return
    steps, done = folder.settings().get("steps", 0), int(found[-1].name.removeprefix("step-"))
    if done < steps:
        raise UsageError(
            f"--out holds an unfinished run, {folder.path}, at step {done} of {steps}: go on with --resume {folder.path}, "
            "begin again with --restart, or choose another folder"
        )


def command_line(args: argparse.Namespace) -> str:
    """The command that trains the same model again."""
    words = ["lama", "train", *([args.settings] if args.settings else [])]
    for name in ("size", *SETTINGS):
        value, flag = getattr(args, name), f"--{FLAGS.get(name, name).replace('_', '-')}"
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *value] if isinstance(value, list) else [flag, str(value)]
    return shlex.join(words)


def heading(text: str) -> None:
    print(f"\n{text}", flush=True)
