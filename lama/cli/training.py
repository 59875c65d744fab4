"""Training from the command line: new and resumed runs of every kind of model."""

import argparse
import importlib
import io
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lama.cli import Parser, machine, processes
from lama.cli.live import LiveLine, heading, progress, say, state, stopped_by, stopping
from lama.cli.out import check_folder, free_folder
from lama.cli.settings import OWNERS, flag_of, given
from lama.errors import LamaError, UsageError, first_line, note
from lama.figures import is_installed
from lama.files import quoted_path
from lama.training.settings import PRESETS, kind_of_settings, pairs, presets, read_settings, settings_of
from lama.training.settings.base import GROUPS
from lama.training.settings.gpt import SHAPE
from lama.training.settings.scale import CHOSEN, Scale

if TYPE_CHECKING:
    from lama.training.folder import RunFolder
    from lama.training.loop import Step
    from lama.training.processes import Processes
    from lama.training.session import Evaluation, Session
    from lama.training.settings import RunSettings

TRACKERS = ("tensorboard", "wandb", "trackio")
FRONTS = {"gpt": "train", "bert": "bert", "seq2seq": "seq2seq", "classifier": "classify"}


def front_of(config: "RunSettings") -> Any:
    """The module with `introduce`, `conclude` and perhaps `remark`, which print this training."""
    name = "conversations" if getattr(config, "chat", ()) else FRONTS[config.model]
    return importlib.import_module(f"lama.cli.{name}")


def metrics_line(event: "Evaluation") -> str:
    loss, metrics = event.validation_loss, event.metrics
    text = f"held-out loss {loss:.4f}"
    if bits := metrics.get("bits_per_byte"):
        text += f", perplexity {math.exp(min(loss, 700.0)):.4g}, {bits:.4f} bits per byte"
    if "accuracy" in metrics:
        text += f", accuracy {metrics['accuracy']:.1%}"
    if "margin" in metrics:
        text += f", reward margin {metrics['margin']:.4f}"
    return f"{text}, the best so far" if event.best else text


def add_options(parser: Parser, default: str) -> None:
    """The options of every command that trains; `default` describes the folder of the run."""
    parser.set_defaults(settings=None, size=None, depth=None, ratio=None)
    out = f"the run's folder (default {default}; NAME-2 if that is taken)"
    parser.add("--out DIR", out, type=Path)
    resume = "resume the run in DIR from its last checkpoint, with the result of an uninterrupted run"
    parser.add("--resume DIR", resume, type=Path)
    parser.add("--restart", "delete the run in --out, finished or not, and start over")
    machine.add_options(parser)
    devices = "share each batch among the first N devices of that kind, or among CUDA:0,CUDA:1,..."
    parser.add("--devices N", devices)
    processes.add_options(parser)
    parser.add("--track", "log to this too; log.jsonl is always written", choices=TRACKERS)


def run(args: argparse.Namespace) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # so that a pipe or a file shows the progress
    machine.use(args)
    return processes.run(args, train, follow)


def train(args: argparse.Namespace, team: "Processes | None" = None) -> int:
    """Begin or resume a run and train; in a team, as the first process. Returns the exit code."""
    from lama.runtime.device import use_devices
    from lama.training.folder import RunFolder
    from lama.training.prepare import lead, new_session

    devices = () if args.devices is None else use_devices(args.devices)
    if args.track:
        from lama.training.trackers import import_tracker

        import_tracker(args.track)
    if args.resume:
        return resume(args, devices, team)
    settings = starting_settings(args)
    kind, model = kind_of_settings(settings), str(settings["model"])
    check = partial(check_run, command=kind.marker, restart=args.restart)
    source = args.settings
    named = source and (model in PRESETS or source in presets(model))
    default = Path("out") / (Path(source).stem if named else "chat" if settings.get("chat") else model)
    folder = RunFolder(free_folder(args.out, default, check), kind.marker)
    with folder.alone():
        check(folder.path)  # a second time: another process may have written there meanwhile
        if args.restart and folder.checkpoints():
            note(f"replacing the run in {folder.path}, which is at step {place_of(folder)}")
        watch_pieces = partial(progress, unit="piece", label="tokenizing")
        session = new_session(
            folder, settings, command_line(args), scale_of(args), devices, watch_pieces, team
        )
        processes.tell(session, team)
        if team:
            lead(team, session)
        front_of(session.config).introduce(session, args)
        return learn(session, args)


def starting_settings(args: argparse.Namespace) -> dict[str, object]:
    """The settings of a new run: those of a preset or a file, and those given as flags."""
    from lama.data.corpora import is_tokenized

    settings: dict[str, object] = {"model": args.model or "gpt"}
    if args.settings:
        settings |= read_settings(args.settings, args.model)
    if (scale := scale_of(args)) and (model := settings["model"]) != "gpt":
        raise UsageError(f"--size and --depth are for a GPT; got --model {model}. Leave them out")
    chosen = given(args, kind_of_settings(settings))
    if args.settings in pairs.PRESETS and {"tokenizer", "held_out"} & chosen.keys():
        why = f"the task {args.settings} has its own"
        raise UsageError(f"--tokenizer and --held-out are for files; {why}. Leave them out")
    dropped: set[str] = set()
    if ("learning_rate" in chosen or scale) and settings.get("min_learning_rate") != 0:
        dropped.add("min_learning_rate")  # it was chosen for another peak
    if chosen.get("optimizer") not in (None, settings.get("optimizer")):  # they suit one optimizer
        dropped |= {f"{group}_learning_rate" for group in GROUPS}
    if "chat" in chosen:
        dropped |= {"corpus", "mixture", "separate"}
    if any(is_tokenized(Path(os.path.expanduser(each))) for each in _texts(chosen.get("corpus"))):
        dropped.add("tokenizer")  # such a folder has its own
    if scale:
        dropped |= {*CHOSEN, "n_kv_heads", *(f"{group}_learning_rate" for group in GROUPS)}
    if {"steps", "epochs"} <= chosen.keys():
        raise UsageError("--steps and --epochs must not be given together: epochs decide the steps")
    if "steps" in chosen:
        dropped.add("epochs")
    if "initial" in chosen:  # a model that is trained further has its own shape and tokenizer
        dropped |= {*SHAPE, "tokenizer"}
    return {name: value for name, value in settings.items() if name not in dropped} | chosen


def _texts(value: object) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list | tuple) else []


def scale_of(args: argparse.Namespace) -> Scale | None:
    """The values of --size, --depth and --ratio; None without the first two. Raises UsageError."""
    if args.size is None and args.depth is None:
        if args.ratio is not None:
            raise UsageError("--ratio needs --size or --depth, whose tokens it chooses")
        return None
    return Scale(args.size, args.depth, *([] if args.ratio is None else [args.ratio]))


def follow(args: argparse.Namespace, team: "Processes") -> int:
    """Train in a process that follows the first one. Returns the exit code."""
    from lama.training.prepare import followed

    if (session := followed(team)) is None:
        return 0
    if not args.resume:
        session.measure()
    with stopping(session.stop, quiet=True) as team.received:
        list(session)
    return 0


def resume(args: argparse.Namespace, devices: tuple[str, ...], team: "Processes | None") -> int:
    from lama.models.registry import describe
    from lama.training.folder import RunFolder
    from lama.training.prepare import lead, resumed_run

    for name in ("settings", "out", "size", "depth", "ratio", "restart"):
        if value := getattr(args, name):
            what = value if name == "settings" else f"--{name}"
            why = "the run's folder has its settings. Leave it out"
            raise UsageError(f"--resume cannot be combined with {what}: {why}")
    folder = RunFolder(args.resume)
    kind = kind_of_settings(settings := folder.settings())
    folder.last_checkpoint()  # so that nothing is written where there is no run
    if args.model not in (None, own := settings.get("model", "gpt")):
        raise UsageError(f"--model must be that of the run, {own}; got {args.model}. Leave it out")
    with folder.alone():
        session = resumed_run(folder, given(args, kind), devices, team)
        steps = session.config.total_steps
        processes.tell(session, team)
        if team:
            lead(team, None if session.finished else session)
        if session.finished:
            print(f"{folder.path} is finished: {steps} steps, {session.result}. Nothing is left to do")
            return 0
        heading(f"Resumed after step {session.step} of {steps}: {folder.path}")
        print(describe(session.model))
        return learn(session, args)


def learn(session: "Session", args: argparse.Namespace) -> int:
    """Train to the end, or to Ctrl-C, and print the result. Returns the exit code."""
    config, folder = session.config, session.folder
    devices = [replica.device for replica in session.trainer.replicas]
    shared = f", shared among {', '.join(devices)}" if devices[1:] else ""
    if team := session.team:
        hosts = len(set(team.hosts))
        shared = f", shared among {team.size} processes on {hosts} host{'s' if hosts > 1 else ''}"
        if config.exchange != "float32":
            note(f"exchange={config.exchange}: another number of processes would give other weights")
    elif config.exchange != "float32":
        note(f"exchange={config.exchange} does nothing: one process exchanges no gradients")
    heading(f"Training: {session.plan}{shared}")
    last, events = None, iter(session)
    with stopping(session.stop) as received:
        if team:
            team.received = received
        try:
            last = watch(session, args, events)
        except OSError:  # the output cannot be written any more
            session.stop()
            list(events)  # to the end: the processes of a team stop at the same step
            if not received:
                note(f"stopped{where(session)}")
                raise
    way_on = where(session)
    if team:
        received = received or [team.stopped] * (team.stopped > 0)
        session.team, team.stage = None, "end"
    if getattr(config, "record", ""):
        show_recording(folder)
    if received:
        draw_curve(folder)
        return stopped_by(received, way_on)
    if gain := session.trainer.gain:
        print(f"{len(devices)} devices computed the gradients {gain:.2f} times as fast as in turn")
    front_of(config).conclude(session, last)
    return 0


def where(session: "Session") -> str:
    """The step that a stopped training has reached, and how to resume it."""
    step = f"step {session.step} of {session.config.total_steps}"
    return f" after {step}; resume with: {session.resume_command}"


def watch(
    session: "Session", args: argparse.Namespace, events: "Iterator[Step | Evaluation]"
) -> "Evaluation | None":
    """Train with a live line, remarks, curve and tracker, by `events`. Returns the last evaluation."""
    from lama.training.loop import Step

    remark = getattr(front_of(session.config), "remark", None)
    steps = session.config.total_steps
    say("compiling the training step, once")
    last, first = None, session.step + 1
    with tracking(args.track, session) as track, closing(LiveLine(steps, session.step)) as line:
        for event in events:
            if isinstance(event, Step):
                line.step(event.step, state(event, session.mfu(event), compiled=event.step > first))
                if remark and not session.stopped and (text := remark(session, event)):
                    line.say(f"step {event.step}: {text}")
            else:
                last = event
                line.say(f"step {event.step}: {metrics_line(event)}")
                draw_curve(session.folder)
            track(event.step, event.metrics)
    return last


@contextmanager
def tracking(kind: str | None, session: "Session") -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Yields a function of a step and its metrics. If a tracker fails, the run continues without it."""
    if kind is None:
        yield lambda step, metrics: None
        return
    from dataclasses import asdict

    from lama.training.trackers import open_tracker

    path, working = session.folder.path, True
    tracker = open_tracker(kind, path, path.absolute().name, asdict(session.config))

    def attempt(work: Callable[..., None], *values: object) -> None:
        nonlocal working
        try:
            if working:
                work(*values)
        except Exception as error:  # each library has its own: no network, no space
            working = False
            note(f"{kind} logging failed; continuing without it: {first_line(error)}")

    try:
        yield partial(attempt, tracker.log)
    finally:
        attempt(tracker.close)


def draw_curve(folder: "RunFolder") -> None:
    """Draw loss.png in the run's folder, where matplotlib is installed; a failure is only noted."""
    if not is_installed():
        return
    from lama.atomic import write_atomically
    from lama.training.curve import loss_curve

    try:
        write_atomically(folder.path / "loss.png", loss_curve(folder.read_log()))
    except LamaError as error:
        note(f"no loss curve: {error}")


def show_recording(folder: "RunFolder") -> None:
    from lama.atomic import write_atomically
    from lama.cli.attention import recording_view
    from lama.cli.out import signed

    try:
        page, what = recording_view(folder.path, "html")
        write_atomically(folder.path / "attention.html", signed(page, "html", "attention"))
        print(f"{what} are in {folder.path / 'attention.html'}")
    except LamaError as error:
        note(f"no page of the recording: {error}")


def check_run(out: Path, command: str, restart: bool) -> None:
    """Refuse a folder that cannot be written, or that holds anything but a run to be replaced."""
    from lama.marker import made_by
    from lama.training.folder import RunFolder, step_of

    folder = RunFolder(out)
    is_run = made_by(out) == command or (command == "train" and folder.is_older_run())
    found = folder.checkpoints() if is_run else []
    if is_run and not found and not os.path.lexists(out / "config.json"):
        restart = True  # it was killed before its first checkpoint: nothing is lost
    elif found and not restart and step_of(found[-1]) < total_steps(folder):
        place = f"{quoted_path(out)}, at step {place_of(folder)}"
        again = f"resume it with {shlex.join(['lama', 'train', '--resume', str(out)])}"
        advice = f"{again}, replace it with --restart, or choose another --out"
        raise UsageError(f"--out holds an unfinished run, {place}: {advice}")
    check_folder(out, command, restart, older=is_run)


def total_steps(folder: "RunFolder") -> int:
    """The steps of the run in a folder; 0 for damaged settings."""
    with suppress(LamaError):
        return settings_of(folder.settings()).total_steps
    return 0


def place_of(folder: "RunFolder") -> str:
    """The place of a run with checkpoints: `7 of 12`."""
    from lama.training.folder import step_of

    return f"{step_of(folder.checkpoints()[-1])} of {total_steps(folder)}"


def command_line(args: argparse.Namespace) -> str:
    """The command that trains the same model again."""
    words = ["lama", "train", *([args.settings] if args.settings else [])]
    for name in ("size", "depth", "ratio", "devices", *OWNERS):
        value, flag = getattr(args, name, None), flag_of(name)
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            words += [flag, *value] if value else []
        elif value is not None:
            words += [flag, str(value)]
    return shlex.join(words)
