"""Train an encoder-decoder on pairs of texts, and check it.

Train the encoder-decoder of 'Attention Is All You Need' on pairs of texts, as `lama train TASK --model
seq2seq` does. `check -m DIR` scores a trained model on its held-out pairs, beside an untrained one. It prints
the loss, and the share of exact targets in three ways: teacher-forced, token by token after the true tokens,
and token by token after its own output. It exits with 1 if the last share is too low, or if no head
attends to the answer's source.
"""

import argparse
import os
import shlex
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from lama.cli import AddVerb, machine, training
from lama.cli.live import heading, progress
from lama.cli.settings import add_settings, given
from lama.errors import LamaError, UsageError
from lama.files import field, quoted_path, read_object
from lama.tables import metric_table
from lama.training.settings import PairSettings, presets

if TYPE_CHECKING:
    from lama.data.pairs import PairData
    from lama.data.tasks import PairTask
    from lama.models.encoder_decoder import Transformer
    from lama.training.pairs import PairSession
    from lama.training.session import Evaluation

# Pairs for the untrained model, which never ends an answer: each has the full length.
UNTRAINED = 64
SHOWN = 7
ANSWERS = partial(progress, label="answers")


def add_parser(add_verb: AddVerb) -> None:
    usage = "%(prog)s TASK|FILE --out DIR [options] [settings]\n       %(prog)s check -m DIR [-v]"
    parser = add_verb("seq2seq", run, __doc__, usage=usage)
    add = parser.add
    tasks = f"{', '.join(presets('seq2seq'))}; a file with source, tab and target in each line; or check"
    add("settings TASK", tasks, nargs="?")
    add("folder DIR", argparse.SUPPRESS, nargs="?", type=Path)
    add("-m DIR", "with check: what --out was", dest="checked", type=Path)
    training.add_options(parser, "out/ and the task's name")
    add("-v, --verbose", "with check: draw the cross-attention")
    add_settings(parser, "seq2seq")
    parser.set_defaults(model="seq2seq")


def run(args: argparse.Namespace) -> int:
    folder = args.checked or args.folder
    if args.settings != "check":
        if folder is not None:
            got = f"{quoted_path(folder)}. Give the folder to save in with --out"
            raise UsageError(f"only check takes a folder after the task; got {got}")
        return training.run(args)
    if folder is None or args.out or args.resume or args.restart or given(args, PairSettings):
        rule = "check must be given the folder of a model, and no settings"
        raise UsageError(f"{rule}. See lama seq2seq --help")
    machine.use(args)
    return check_model(folder, args.verbose)


def introduce(session: "PairSession", args: argparse.Namespace) -> None:
    from lama.data.tasks import TASKS
    from lama.models.registry import describe

    config, pairs, held_out = session.config, session.data.pairs, session.held_out
    task = TASKS.get(config.task)
    heading(f"The task: {task.about if task else f'the pairs of {config.task}'}")
    for source, target in pairs[:3]:
        print(f"  {source} -> {target}")
    where = f"{len(held_out.pairs):,} held out" if config.held_out else "evaluated on the same pairs"
    print(f"{len(pairs):,} pairs for training, {where}\n{describe(session.model)}")
    session.shares = {"untrained": exact(session.model, head(held_out, UNTRAINED))}
    session.measure_start()


def conclude(session: "PairSession", last: "Evaluation | None") -> None:
    """Print the shares of exact answers and the losses. Raises LamaError if a baseline is as good."""
    before, out = session.shares.get("untrained", 0.0), session.folder.path
    baselines = {name: share for name, share in session.shares.items() if name != "untrained"}
    name, baseline = max(baselines.items(), key=itemgetter(1))
    after = exact(session.model, session.held_out)
    losses = {"untrained": session.untrained, **session.baselines}
    losses["trained"] = last.validation_loss if last else session.measure()["validation_loss"]
    shares = {"untrained": before, name: baseline, "trained": after}
    session.add_notes({"exact": shares, "loss_nats_per_token": losses})
    heading("Result")
    rows = ("exact match", shares.values(), ".1%"), ("loss, nats per token", losses.values(), ".5f")
    print(metric_table("metric", ("untrained", "baseline", "trained"), *rows))
    print(f"(baseline: {name}; for the loss, the frequencies of the tokens)\n")
    folder, text = shlex.quote(str(out)), shlex.quote(session.held_out.pairs[0][0])
    print(f"{session.seconds:.0f} s in all; saved in {out}. Use it, and check it:")
    print(f"  lama translate -m {folder} {text}\n  lama seq2seq check -m {folder}")
    if after <= max(before, baseline) or losses["trained"] >= session.untrained:
        got = f"{after:.1%} exact. Train for more --steps"
        raise LamaError(f"the trained model must beat the untrained one and the baseline; got {got}")


def head(data: "PairData", n: int) -> "PairData":
    return type(data)(data.pairs[:n], data.sources[:n], data.targets[:n])


def exact(model: "Transformer", data: "PairData") -> float:
    from lama.generation.seq2seq import Searcher, share_exact

    return share_exact(Searcher(model).answers(data.sources, ANSWERS), data.targets)


def check_model(folder: Path, verbose: bool) -> int:
    """Score a saved model on its held-out pairs, as the help describes. Returns the exit code."""
    from lama.checkpoints import load_kind
    from lama.data.pairs import encode_pairs, read_pairs
    from lama.data.tasks import TASKS
    from lama.generation.seq2seq import pair_score
    from lama.models.encoder_decoder import Transformer
    from lama.models.registry import describe
    from lama.tokenizers import PairTokenizer
    from lama.training.pairs import HELD_OUT

    if not os.path.isdir(folder):
        where = quoted_path(folder)
        raise UsageError(f"check must be given a folder of lama seq2seq; got {where}, which is not a folder")
    model, tokenizer = load_kind("transformer", folder, PairTokenizer)
    source, fields = quoted_path(folder / "config.json"), read_object(folder / "config.json")
    notes = field(fields, "training", dict, source, {})
    seed = field(field(notes, "settings", dict, source, {}), "seed", int, source, 0)
    data = encode_pairs(read_pairs(folder / HELD_OUT), tokenizer)
    if (longest := max(data.lengths)) > (most := model.config.context_length):
        sizes = f"{longest} tokens in {folder / HELD_OUT}, context_length={most}"
        raise LamaError(f"pairs must fit context_length; got {sizes}")
    task = TASKS.get(field(notes, "task", str, source, ""))
    print(f"{describe(model)}\n{len(data.pairs):,} pairs of {folder / HELD_OUT}")
    untrained = pair_score(Transformer(model.config, abs(seed)), head(data, UNTRAINED))
    trained = pair_score(model, data, ANSWERS)

    scores = (untrained, trained)
    rows = (
        ("loss, nats per token", [score.loss for score in scores], ".6f"),
        ("exact: teacher-forced", [score.forced for score in scores], ".1%"),
        ("  on true prefixes", [score.prefixes for score in scores], ".1%"),
        ("  on its own output", [score.own for score in scores], ".1%"),
    )
    print(f"{metric_table('metric', ('untrained', 'trained'), *rows)}\n")
    for (text, target), answer in list(zip(data.pairs, trained.answers, strict=True))[:SHOWN]:
        said = tokenizer.decode(answer.tokens)
        print(f"  {text} -> {said}{'' if said == target else f'   (should be {target})'}")
    least = task.exact if task else max(untrained.own, 1 / len(data.pairs))
    problems = []
    if trained.own < least:
        rule = f"on its own output it must answer {least:.1%} exactly"
        problems.append(f"{rule}; got {trained.own:.1%}")
    if task and task.fields:
        reached = show_focus(model, head(data, 100), task, verbose)
        if reached < task.focus:
            rule = f"a head must spend {task.focus} of its cross-attention on the answer's source"
            problems.append(f"{rule}; got {reached:.3f}")
    if problems:
        raise LamaError(f"{'; '.join(problems)}. Train for more --steps")
    return 0


def show_focus(model: "Transformer", data: "PairData", task: "PairTask", verbose: bool) -> float:
    """Print each head's share of cross-attention at the answer's source. Returns the largest."""
    from lama.interp.attention import draw_pattern
    from lama.interp.cross_attention import cross_patterns, focus

    assert task.fields is not None
    patterns = cross_patterns(model, data)
    shares = focus(patterns, [task.fields(pair) for pair in data.pairs])
    print("\nshare of cross-attention at the answer's source, for each head:")
    for layer, heads in enumerate(shares):
        print(f"  layer {layer}: {' '.join(f'{share:.3f}' for share in heads)}   mean {heads.mean():.3f}")
    if verbose:
        layer, best = divmod(int(shares.argmax()), shares.shape[1])
        source, target = data.pairs[0]
        print(f"\nlayer {layer}, head {best}: rows {target}, columns {source}")
        print(draw_pattern(patterns[layer, 0, best], list(target), list(source)))
    return float(shares.max())
