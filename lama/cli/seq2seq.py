"""`lama seq2seq`: train an encoder-decoder on pairs of texts, and check what it has learned."""

import argparse
import os
import shlex
import sys
import time
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lama.cli import machine
from lama.cli.live import LiveLine, heading, progress, state, stopped_by, stopping
from lama.cli.out import own_folder
from lama.cli.settings import add_settings, given
from lama.errors import LamaError, UsageError, quoted
from lama.files import field, quoted_path, read_object
from lama.training.pair_settings import TASK_SETTINGS, PairSettings

if TYPE_CHECKING:
    from lama.data.pairs import PairData
    from lama.data.tasks import PairTask
    from lama.models.transformer import Transformer
    from lama.tokenizers import PairTokenizer
    from lama.training.pairs import PairTrainer

HELD_OUT = "held-out.tsv"
JUDGED = 1000  # held-out pairs, at most
UNTRAINED = 64  # pairs that an untrained model answers: it knows no end, and each answer is as long as it may be
SHOWN = 7
TOKENIZERS = ("characters", "words")
ANSWERS = partial(progress, unit="batch", label="answers")


def add_parser(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "seq2seq",
        help="train an encoder-decoder on pairs of texts, and check it",
        usage="%(prog)s TASK|FILE --out DIR [options] [settings]\n       %(prog)s check DIR [-v]",
        description="Train the encoder-decoder of 'Attention Is All You Need' on pairs of texts, evaluate it on held-out pairs, and save "
        "it for lama translate. Ctrl-C finishes the step and saves. Exits with 1 if it is no better than untrained, copying, or the most "
        "frequent answer. `check DIR` reads the folder again and lets the model answer in four ways: untrained, with the true target "
        "before it, token by token on the true target, and token by token on its own output; it exits with 1 if it answers too few.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("task", metavar="TASK", help=f"{', '.join(TASK_SETTINGS)}; a file with source, tab and target in each line; or check")
    add("folder", nargs="?", type=Path, metavar="DIR", help="with check: what --out was")
    add("--out", type=Path, metavar="DIR", help="the model's folder (default out/ and the task's name, or NAME-2)")
    add("--restart", action="store_true", help="replace the model of an earlier lama seq2seq in --out, which is lost")
    add("--tokenizer", choices=TOKENIZERS, help="of a file (default words)")
    add("--held-out", type=float, metavar="X", help="share of a file's pairs to judge by (default 0.1); 0 judges by what was learned")
    machine.add_options(parser)
    add("-v", "--verbose", action="store_true", help="draw where the decoder looks")
    add_settings(parser, PairSettings, leave_out=("recompute",))


def run(args: argparse.Namespace) -> int:
    machine.use(args)
    if args.task == "check":
        if args.folder is None or args.out is not None or args.restart or given(args, PairSettings):
            raise UsageError("check must be given the folder of a model, and no settings. See lama seq2seq --help")
        return check(args.folder, args.verbose)
    if args.folder is not None:
        raise UsageError(f"only check takes a folder beside the task; got {quoted_path(args.folder)}. Where to save goes after --out")
    task = find_task(args)
    settings = PairSettings(**{**TASK_SETTINGS.get(args.task, {}), **given(args, PairSettings)})
    with own_folder(args.out, Path("out") / Path(args.task).stem, "seq2seq", replace=args.restart) as out:
        return train(args, task, settings, out)


def train(args: argparse.Namespace, task: "PairTask", settings: PairSettings, out: Path) -> int:
    from lama.checkpoints import save
    from lama.data.pairs import encode_pairs, pair_baselines, split_pairs, unigram_loss
    from lama.training.pairs import PairTrainer, pair_model

    began = time.monotonic()
    learned, judged = split_pairs(task.make(), task.held_out, task.key)
    if not learned or (task.held_out and not judged):
        raise LamaError(f"there must be pairs to learn and pairs to judge by; got {len(learned)} and {len(judged)}. Change --held-out")
    judged = sample(judged or learned, JUDGED)
    tokenizer = make_tokenizer(task.tokenizer, [text for pair in learned for text in pair])
    data, held_out = encode_pairs(learned, tokenizer), encode_pairs(judged, tokenizer)
    model = pair_model(settings, tokenizer, [max(a, b) for a, b in zip(data.lengths, held_out.lengths, strict=True)])
    trainer = PairTrainer(model, settings, data, held_out)

    heading(f"The task: {task.about}")
    for source, target in learned[:3]:
        print(f"  {source} -> {target}")
    where = f"{len(judged):,} others to judge by" if task.held_out else "judged by the same"
    print(f"{len(data.pairs):,} pairs to learn from, {where}\n{model.describe()}")
    baselines, unigram = pair_baselines(learned, judged), unigram_loss(data, held_out, tokenizer.vocab_size)
    before_loss, before = trainer.loss(), exact(model, head(held_out, UNTRAINED))

    heading(f"Training: {settings.steps} steps of {settings.batch_size} pairs")
    with stopping(trainer) as received:
        watch(trainer)
    trainer.finish()
    after_loss, after = trainer.loss(), exact(model, held_out)
    name, baseline = max(baselines.items(), key=lambda item: item[1])
    notes = {
        "task": args.task,
        "command": shlex.join(sys.argv[1:]),
        "settings": asdict(settings),
        "steps": trainer.trainer.step,
        "seconds": round(time.monotonic() - began, 1),
        "exact": {"untrained": before, name: baseline, "trained": after},
        "loss_nats_per_token": {"untrained": before_loss, "unigram": unigram, "trained": after_loss},
    }
    save(out, model, tokenizer, notes)
    write_pairs(out / HELD_OUT, judged)

    heading("What it learned")
    rows = (
        ("exact match", (percent(before), percent(baseline), percent(after))),
        ("loss, nats per token", loss_cells(before_loss, unigram, after_loss)),
    )
    print(f"{table(rows)}\n(baseline: {name}; the tokens' shares for the loss)\n")
    folder, text = shlex.quote(str(out)), shlex.quote(judged[0][0])
    print(f"{time.monotonic() - began:.0f} s in all; saved in {out}. Let it answer, and check it:")
    print(f"  lama translate {folder} {text}\n  lama seq2seq check {folder}")
    if received:
        return stopped_by(received, f" after step {trainer.trainer.step} of {settings.steps}; the model as it was then is in {out}")
    if after <= max(before, baseline) or after_loss >= before_loss:
        raise LamaError(
            f"the trained model must beat the untrained one and the baseline; got {percent(after)} exact. Train for more --steps"
        )
    return 0


def find_task(args: argparse.Namespace) -> "PairTask":
    """The task of that name, or that of the file. Raises LamaError."""
    from lama.data.pairs import read_pairs
    from lama.data.tasks import TASKS, PairTask
    from lama.errors import did_you_mean

    if args.task in TASKS:
        if args.tokenizer or args.held_out is not None:
            raise UsageError(f"--tokenizer and --held-out are for files; the task {args.task} has its own. Leave them out")
        return TASKS[args.task]
    path = Path(args.task)
    if not os.path.isfile(path):
        raise UsageError(f"a task must be {', '.join(TASKS)}, or a file of pairs; got {quoted(args.task)}{did_you_mean(args.task, TASKS)}")
    held_out = 0.1 if args.held_out is None else args.held_out
    if not 0 <= held_out < 1:
        raise UsageError(f"held-out must be at least 0 and below 1; got {held_out}")
    pairs = read_pairs(path)
    return PairTask(f"the pairs of {path}", lambda: pairs, args.tokenizer or "words", held_out)


def make_tokenizer(kind: str, texts: list[str]) -> "PairTokenizer":
    from lama.tokenizers import CharacterTokenizer, PairTokenizer, WordTokenizer

    return PairTokenizer(WordTokenizer.of(texts) if kind == "words" else CharacterTokenizer("".join(sorted(set("".join(texts))))))


def sample(pairs: list[tuple[str, str]], n: int) -> list[tuple[str, str]]:
    """Up to n of them, evenly from all."""
    return [pairs[i * len(pairs) // n] for i in range(n)] if len(pairs) > n else pairs


def head(data: "PairData", n: int) -> "PairData":
    from lama.data.pairs import PairData

    return PairData(data.pairs[:n], data.sources[:n], data.targets[:n])


def exact(model: "Transformer", data: "PairData") -> float:
    from lama.generation.seq2seq import answers, share_exact

    return share_exact(answers(model, data.sources, progress=ANSWERS), data.targets)


def watch(trainer: "PairTrainer") -> None:
    """Train with a live line, and the held-out loss now and then."""
    settings = trainer.config
    every = max(1, settings.steps // 8)
    print("compiling the training step, once", file=sys.stderr)
    with closing(LiveLine(settings.steps, 0)) as line:
        for step in trainer:
            line.step(step.step, state(step, None, compiled=step.step > 1))
            if step.step % every == 0 and not trainer.stopped:
                line.say(f"step {step.step}: loss {step.loss:.4f}, held-out loss {trainer.loss():.4f}")


def table(rows: Any, columns: tuple[str, ...] = ("untrained", "baseline", "trained")) -> str:
    lines = [("metric", columns), *rows]
    return "\n".join(f"{name:<22}| " + " | ".join(f"{cell:>10}" for cell in cells) for name, cells in lines)


def percent(share: float) -> str:
    return f"{share:.1%}"


def loss_cells(*losses: float) -> tuple[str, ...]:
    return tuple(f"{loss:.5f}" for loss in losses)


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> None:
    from lama.checkpoints.atomic import atomic_write

    with atomic_write(path) as file:
        file.write("".join(f"{source}\t{target}\n" for source, target in pairs).encode())


def check(folder: Path, verbose: bool) -> int:
    """The four ways to answer, on the held-out pairs that were saved with the model. The exit code."""
    from lama.checkpoints import load_kind
    from lama.data.pairs import encode_pairs, read_pairs
    from lama.data.tasks import TASKS
    from lama.generation.seq2seq import pair_score
    from lama.models.transformer import Transformer
    from lama.tokenizers import PairTokenizer

    if not os.path.isdir(folder):
        raise UsageError(f"check must be given a folder of lama seq2seq; got {quoted_path(folder)}, which is none")
    model, tokenizer = load_kind("transformer", folder, PairTokenizer)
    config = folder / "config.json"
    notes = field(read_object(config), "training", dict, quoted_path(config), {})
    seed = field(field(notes, "settings", dict, quoted_path(config), {}), "seed", int, quoted_path(config), 0)
    data = encode_pairs(read_pairs(folder / HELD_OUT), tokenizer)
    if (longest := max(data.lengths)) > (most := model.config.context_length):
        raise LamaError(f"pairs must fit context_length; got {longest} tokens in {folder / HELD_OUT}, context_length={most}")
    task = TASKS.get(field(notes, "task", str, quoted_path(config), ""))
    print(f"{model.describe()}\n{len(data.pairs):,} pairs of {folder / HELD_OUT}")
    untrained = pair_score(Transformer(model.config, abs(seed)), head(data, UNTRAINED))
    trained = pair_score(model, data, ANSWERS)

    rows = (
        ("loss, nats per token", untrained.loss, trained.loss, "{:.6f}"),
        ("exact: teacher-forced", untrained.forced, trained.forced, "{:.1%}"),
        ("  on true prefixes", untrained.prefixes, trained.prefixes, "{:.1%}"),
        ("  on its own output", untrained.own, trained.own, "{:.1%}"),
    )
    print(table([(name, (form.format(a), form.format(b))) for name, a, b, form in rows], ("untrained", "trained")))
    print()
    for (source, target), answer in list(zip(data.pairs, trained.answers, strict=True))[:SHOWN]:
        said = tokenizer.decode(answer.tokens)
        print(f"  {source} -> {said}{'' if said == target else f'   (should be {target})'}")
    least = task.exact if task else max(untrained.own, 1 / len(data.pairs))
    problems = [] if trained.own >= least else [f"on its own output it must answer {percent(least)} exactly; got {percent(trained.own)}"]
    if task and task.fields:
        reached = show_focus(model, head(data, 100), task, verbose)
        if reached < task.focus:
            problems.append(f"a head must look with a share of {task.focus} where it should; got {reached:.3f}")
    if problems:
        raise LamaError(f"{'; '.join(problems)}. Train for more --steps")
    return 0


def show_focus(model: "Transformer", data: "PairData", task: "PairTask", verbose: bool) -> float:
    """Where cross-attention looks; the best head's share."""
    from lama.interp.attention import draw_pattern
    from lama.interp.cross_attention import cross_patterns, focus

    assert task.fields is not None
    patterns = cross_patterns(model, data)
    shares = focus(patterns, [task.fields(pair) for pair in data.pairs])
    print("\nshare of cross-attention that goes where the answer stands, head by head:")
    for layer, heads in enumerate(shares):
        print(f"  layer {layer}: {' '.join(f'{share:.3f}' for share in heads)}   mean {heads.mean():.3f}")
    if verbose:
        layer, best = divmod(int(shares.argmax()), shares.shape[1])
        source, target = data.pairs[0]
        print(f"\nlayer {layer}, head {best}: rows {target}, columns {source}")
        print(draw_pattern(patterns[layer, 0, best], list(target), list(source)))
    return float(shares.max())
