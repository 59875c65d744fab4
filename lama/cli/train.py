"""`lama train`, and `python transformer.py`: train a GPT, from scratch or from another, and generate from it."""

import argparse
import importlib.util
import io
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lama.cli import machine
from lama.cli.live import LiveLine, heading, state, stopped_by, stopping, tokenizing
from lama.cli.out import check_folder, free_folder
from lama.cli.settings import add_settings, flag_of, given, show
from lama.errors import LamaError, UsageError, first_line, note
from lama.files import quoted_path
from lama.training.config import MODEL_SETTINGS, SETTINGS, SIZE_SETTINGS, RunConfig, presets, read_settings, run_config

if TYPE_CHECKING:
    from lama.data import Corpus
    from lama.models.gpt import GPT
    from lama.tokenizers import Tokenizer
    from lama.training.folder import RunFolder
    from lama.training.run import Evaluation, Run

SAMPLE_TOKENS = 160
OWN_SETTINGS = set(MODEL_SETTINGS) - {"context_length"}  # of a model that is trained on
TRACKERS = ("tensorboard", "wandb", "trackio")


def add_parser(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "train",
        help="train a GPT, from scratch or from another",
        usage="%(prog)s [PRESET | FILE.toml] [options] [settings]",
        description="Train a GPT on a text (default: the King James Bible), evaluate it on held-out text against n-gram models, and save "
        "it in a folder for `lama generate -m`. Settings come from a preset or a file, and each can be given here. Ctrl-C finishes the "
        "step, saves a checkpoint and prints the resume command. Exits with 1 if the model is no better than bigram counts.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("settings", nargs="?", metavar="PRESET", help=f"{', '.join(presets())}; or a .toml file, such as a run's own settings.toml")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="the run's folder (default out/gpt, or out/ and the preset's name; NAME-2 where that is taken)",
    )
    add("--resume", type=Path, metavar="DIR", help="resume the run in DIR from its last checkpoint, as if it had not ended")
    add("--restart", action="store_true", help="replace the run in --out, finished or not, which is lost")
    add("--size", metavar="N", help="choose depth, width, heads, learning rate and batch size for N parameters, such as 800K or 10M")
    machine.add_options(parser)
    add("--devices", metavar="N", help="share each batch among the first N devices of that kind, or among CUDA:0,CUDA:1,...")
    add("--track", choices=TRACKERS, help="log to this too; log.jsonl is always written")
    add("-v", "--verbose", action="store_true", help="explain each stage on the real data as it goes")
    add_settings(parser, RunConfig, about="in a file: the same names with _ for -, and initial for --from")


def run(args: argparse.Namespace) -> int:
    from lama.device import use_devices
    from lama.training.folder import RunFolder
    from lama.training.run import new_run, resumed_run

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # so that a pipe or a file shows how far it is
    machine.use(args)
    devices = () if args.devices is None else use_devices(args.devices)
    chosen = given(args, RunConfig)
    if args.track:
        from lama.training.trackers import import_tracker

        import_tracker(args.track)
    if args.resume:
        for name in ("settings", "out", "size", "restart"):
            if getattr(args, name):
                what = getattr(args, name) if name == "settings" else f"--{name}"
                raise UsageError(f"--resume must stand without {what}: all is taken from the run's own folder. Leave it out")
        folder = RunFolder(args.resume)
        folder.settings(), folder.last_checkpoint()  # nothing is written where there is no run
        with folder.alone():
            session = resumed_run(folder, chosen, devices)
            if session.finished:
                print(f"{folder.path} is finished: {session.config.steps} steps, held-out loss {session.best:.4f}. Nothing is left to do")
                return 0
            heading(f"Resumed after step {session.trainer.step} of {session.config.steps}: {folder.path}")
            print(session.model.describe())
            return learn(session, args)
    settings = read_settings(args.settings) if args.settings else {}
    if "learning_rate" in chosen or args.size is not None:  # where the cosine ends belongs to its peak
        settings.pop("min_learning_rate", None)
    if args.size is not None:
        settings = {name: value for name, value in settings.items() if name not in (*SIZE_SETTINGS, "d_mlp")}
    if args.initial:  # a preset's shape and tokenizer are not for a model that has its own
        settings = {name: value for name, value in settings.items() if name not in (*OWN_SETTINGS, "tokenizer")}
    default = Path("out") / (args.settings if args.settings in presets() else "gpt")
    folder = RunFolder(free_folder(args.out, default, partial(check_run, restart=args.restart)))
    with folder.alone():
        session, corpus = new_run(folder, settings | chosen, command_line(args), args.size, devices, tokenizing)
        introduce(session, corpus, args)
        return learn(session, args)


def introduce(session: "Run", corpus: "Corpus", args: argparse.Namespace) -> None:
    """Print what is trained on what, and where it starts from."""
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
    if config.precision != "float32" and str(model.embed.weight.device).startswith("CPU"):
        note(f"{config.precision} is for a GPU: a CPU is faster in float32, with lama's own kernels")
    if args.size:
        words = (f"{flag_of(name)} {show(getattr(config, name))}" for name in SIZE_SETTINGS)
        print(f"chosen for {args.size} parameters: {' '.join(words)}")

    heading("Before training")
    session.measure_start()
    print("loss on the held-out text, in nats per token (lower is better; what counting alone gives, and this model):")
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in session.baselines.items())
    print(f"  {losses}; {'the model as it is' if config.initial else 'untrained model'} {session.untrained:.3f}")


def learn(session: "Run", args: argparse.Namespace) -> int:
    """Train to the end, or to Ctrl-C; say what came of it. The exit code."""
    config, folder, model, tokenizer = session.config, session.folder, session.model, session.tokenizer
    first = len(tokenizer.encode(""))  # a token such as BOS, which every prompt gets
    prompt = opening(tokenizer.decode(session.tokens.train[first : first + 1000].tolist()), config.context_length)
    heading(f"Training: {config.steps} steps of {config.batch_size} x {config.context_length} tokens{shared(session)}")
    last = None
    with stopping(session) as received:
        try:
            last = watch(session, prompt, args)
        except OSError:  # what it prints cannot be written any more
            session.stop()
            for _ in session:
                pass
            if not received:
                note(f"stopped after step {session.trainer.step} of {config.steps}; go on with: {session.again}")
                raise
    if config.record:
        show_recording(folder)
    if received:
        draw_curve(folder)
        return stopped_by(received, f" after step {session.trainer.step} of {config.steps}; go on with: {session.again}")

    if gain := session.trainer.gain:
        print(f"{len(session.trainer.replicas)} devices found the gradients {gain:.2f} times as fast together as one after the other")
    heading("What it learned")
    print(f"{prompt}{sample(model, tokenizer, prompt, 2 * SAMPLE_TOKENS)}\n")
    bigram = session.baselines.get("bigram", math.inf)
    tokens_per_byte = len(session.tokens.validation) / session.tokens.validation_bytes
    print(table(session.untrained, bigram, session.best, tokens_per_byte, "before" if config.initial else "untrained"))
    again = shlex.join(["lama", "generate", "-m", str(folder.path), "-p", prompt.strip()])
    print(f"\nsaved in {folder.path}{best_of(last, session)}. Continue any text with it:\n  {again}")
    if session.best >= session.untrained:
        raise LamaError(f"the trained model must beat the one it began as; got {session.best:.3f} nats per token. Lower the learning rate")
    if not config.initial and session.best >= bigram:
        raise LamaError(
            f"the trained model must beat the bigram baseline; got {session.best:.3f} nats per token. "
            f"Train for more than {config.steps} steps"
        )
    return 0


def shared(session: "Run") -> str:
    devices = [replica.device for replica in session.trainer.replicas]
    return f", shared among {', '.join(devices)}" if devices[1:] else ""


def best_of(last: "Evaluation | None", session: "Run") -> str:
    if last is None or last.best:
        return ""
    return f" (the best of the run, not the last, which has {last.validation_loss:.3f})"


def watch(session: "Run", prompt: str, args: argparse.Namespace) -> "Evaluation | None":
    """Train with a live line, samples, the curve and the tracker; returns the last evaluation."""
    from lama.training.loop import Step

    config = session.config
    every = config.sample_every or max(1, config.steps // 4)
    print("compiling the training step, once", file=sys.stderr)
    last, first = None, session.trainer.step + 1
    with tracking(args.track, session) as track, closing(LiveLine(config.steps, session.trainer.step)) as line:
        for event in session:
            if isinstance(event, Step):
                line.step(event.step, state(event, session.mfu(event), compiled=event.step > first))
                metrics = {"loss": event.loss, "learning_rate": event.learning_rate, "gradient_norm": event.gradient_norm}
                if event.step % every == 0 and event.step < config.steps and not session.stopped:
                    text = sample(session.model, session.tokenizer, prompt, SAMPLE_TOKENS)
                    line.say(f"step {event.step}: loss {event.loss:.3f}  {text!r}")
            else:
                last = event
                metrics = {"validation_loss": event.validation_loss, "bits_per_byte": event.bits_per_byte}
                line.say(
                    f"step {event.step}: held-out loss {event.validation_loss:.4f}, perplexity {event.perplexity:.4g}, "
                    f"{event.bits_per_byte:.4f} bits per byte{', the best so far' if event.best else ''}"
                )
                draw_curve(session.folder)
            track(event.step, metrics)
    return last


@contextmanager
def tracking(kind: str | None, session: "Run") -> Iterator[Callable[..., None]]:
    """Yields a function of a step and its metrics. Only the log is needed: if a tracker fails, the run continues without it."""
    if kind is None:
        yield lambda step, metrics: None
        return
    from dataclasses import asdict

    from lama.training.trackers import open_tracker

    path, failed = session.folder.path, False
    tracker = open_tracker(kind, path, path.absolute().name, asdict(session.config))

    def unless_it_failed(work: Callable[..., None], *args: Any) -> None:
        nonlocal failed
        if failed:
            return
        try:
            work(*args)
        except Exception as error:  # each library has its own: no network, no space
            failed = True
            note(f"{kind} takes no more, and the run goes on without it: {first_line(error)}")

    try:
        yield partial(unless_it_failed, tracker.log)
    finally:
        unless_it_failed(tracker.close)


def draw_curve(folder: "RunFolder") -> None:
    """loss.png in the run's folder, where matplotlib is installed; the log alone is needed, so a failure only says so."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from lama.checkpoints.atomic import atomic_write
    from lama.training.curve import loss_curve

    try:
        with atomic_write(folder.path / "loss.png") as file:
            file.write(loss_curve(folder.read_log()))
    except LamaError as error:
        note(f"no loss curve: {error}")


def show_recording(folder: "RunFolder") -> None:
    """attention.html in the run's folder; the recording alone is needed, so a failure only says so."""
    from lama.checkpoints.atomic import atomic_write
    from lama.cli.attention import recording_view
    from lama.cli.out import signed

    try:
        page, what = recording_view(folder.path, "html")
        with atomic_write(folder.path / "attention.html") as file:
            file.write(signed(page, "html", "attention"))
        print(f"{what} are in {folder.path / 'attention.html'}")
    except LamaError as error:
        note(f"no page of the recording: {error}")


def sample(model: "GPT", tokenizer: "Tokenizer", prompt: str, n: int) -> str:
    from lama.generation import generate

    return str(generate(model, tokenizer, prompt, max_new_tokens=n, temperature=0.8, window=True))


def opening(text: str, context_length: int) -> str:
    """The first line of the text, cut to half a window: the prompt of the samples."""
    line = next((line for line in text.splitlines() if line.strip()), text[:1])
    end = "\n" if "\n" in text else ""  # a tokenizer of the text's characters knows no others
    return line[: max(1, context_length // 2)] + end


def table(untrained: float, bigram: float, trained: float, tokens_per_byte: float, first: str = "untrained") -> str:
    """The losses, and what they mean, side by side."""
    columns = (untrained, bigram, trained)
    rows = (
        ("loss, nats per token", [f"{loss:.3f}" for loss in columns]),
        ("bits per byte", [f"{loss / math.log(2) * tokens_per_byte:.3f}" for loss in columns]),
        ("perplexity", [f"{math.exp(loss):.2f}" if loss < 20 else "-" for loss in columns]),
    )
    lines = [f"{'metric':<22}| {first:>10} | {'n-gram (2)':>10} | {'trained':>10}"]
    return "\n".join(lines + [f"{name:<22}| " + " | ".join(f"{value:>10}" for value in values) for name, values in rows])


def check_run(out: Path, restart: bool) -> None:
    """Refuse, before hours of training, a folder that cannot be written, or that holds anything but a run to be replaced."""
    from lama.checkpoints.made import made_by
    from lama.training.folder import RunFolder, step_of

    folder = RunFolder(out)
    is_run = made_by(out) == "train" or folder.is_older_run()
    found = folder.checkpoints() if is_run else []
    if is_run and not found and not os.path.lexists(out / "config.json"):
        restart = True  # it was killed before its first checkpoint: nothing is lost
    elif found:
        done, steps = step_of(found[-1]), 0
        with suppress(LamaError):  # damaged settings
            steps = run_config(folder.settings()).steps
        if restart:
            note(f"replacing the run in {out}, which is at step {done} of {steps}")
        elif done < steps:
            again = shlex.join(["lama", "train", "--resume", str(out)])
            raise UsageError(
                f"--out holds an unfinished run, {quoted_path(out)}, at step {done} of {steps}: go on with it, {again}, "
                "lose it with --restart, or choose another --out"
            )
    check_folder(out, "train", restart, older=lambda _: is_run)


def command_line(args: argparse.Namespace) -> str:
    """The command that trains the same model again."""
    words = ["lama", "train", *([args.settings] if args.settings else [])]
    for name in ("size", "devices", *SETTINGS):
        value, flag = getattr(args, name), flag_of(name)
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *value] if isinstance(value, list) else [flag, str(value)]
    return shlex.join(words)
