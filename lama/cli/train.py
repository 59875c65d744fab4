"""`lama train`, and `python transformer.py`: train a small GPT from scratch and generate from it."""

import argparse
import math
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lama.errors import LamaError, UsageError

if TYPE_CHECKING:
    from lama.models.gpt import GPT
    from lama.tokenizers import Tokenizer

EVALUATION_TOKENS = 30_000  # of the held-out text, spread over all of it
SAMPLE_TOKENS = 160


def add_parser(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "train",
        help="train a GPT from scratch",
        description="Train a GPT from scratch on a text (default: the King James Bible), judge it on held-out text against n-gram "
        "models, and save it in a folder that `gpt.py -m` runs. Exits with 1 if it is not better than they are.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--corpus", type=Path, metavar="FILE", help="a UTF-8 text file")
    add("--out", type=Path, default=Path("out/gpt"), metavar="DIR", help="where the model is saved (default out/gpt)")
    add("--tokenizer", choices=("bytes", "character"), default="bytes", help="tokens are bytes, so that any prompt works, or characters")
    add("--steps", type=int, default=500, help="updates (default 500)")
    add("--batch-size", type=int, default=12, metavar="B", help="windows in a batch (default 12)")
    add("--context-length", type=int, default=64, metavar="T", help="tokens in a window (default 64)")
    add("--d-model", type=int, default=128, metavar="D", help="width of the residual stream (default 128)")
    add("--n-layers", type=int, default=4, metavar="L", help="blocks (default 4)")
    add("--n-heads", type=int, default=4, metavar="H", help="heads in a block (default 4)")
    add("--learning-rate", type=float, default=2e-3, metavar="R", help="at its peak (default 2e-3)")
    add("--seed", type=int, default=0, help="decides initial weights and the order of the batches (default 0)")
    add("--device", help="a tinygrad device, such as CPU, CUDA or METAL (default: tinygrad's choice)")
    add("-v", "--verbose", action="store_true", help="explain each stage on the real data as it goes; show tracebacks")


def run(args: argparse.Namespace) -> int:
    from lama.checkpoints import save
    from lama.data import batch, default_corpus, encode_corpus, evaluation_windows, ngram_baselines, read_corpus, split
    from lama.device import use_device
    from lama.models.gpt import GPT, GPTConfig
    from lama.tokenizers import ByteTokenizer, CharacterTokenizer
    from lama.training import Evaluator, TrainingConfig

    if args.device:
        use_device(args.device)
    check_out(args.out)
    began = time.perf_counter()
    corpus = read_corpus(args.corpus) if args.corpus else default_corpus()
    tokenizer: Tokenizer = CharacterTokenizer(corpus.text) if args.tokenizer == "character" else ByteTokenizer()
    config = TrainingConfig(args.steps, args.batch_size, args.learning_rate, args.learning_rate / 10, min(50, args.steps), seed=args.seed)
    try:
        shape = GPTConfig(tokenizer.vocab_size, args.context_length, args.d_model, args.n_layers, args.n_heads, bias=False)
    except ValueError as error:
        raise UsageError(str(error)) from error
    learn, heldout = split(encode_corpus(tokenizer, corpus.text))
    windows = evaluation_windows(heldout, args.context_length, max(1, EVALUATION_TOKENS // args.context_length))
    model = GPT(shape, args.seed)

    heading(f"The corpus: {corpus.name}")
    if args.verbose:
        from lama.interp.walkthrough import explain_attention, explain_corpus, explain_parameters, explain_window

        print(explain_corpus(corpus, tokenizer, learn, heldout))
        inputs, targets = batch(learn, 0, args.seed, 1, args.context_length)
        heading("A window of it")
        print(explain_window(tokenizer, inputs[0], targets[0]))
        heading("Through the model, before it has learned anything")
        print(explain_attention(model, tokenizer, inputs[0]))
        heading("What there is to learn")
        print(explain_parameters(model))
    else:
        print(f"{len(learn):,} tokens to learn from, {len(heldout):,} held out\n{model.describe()}")

    heading("Before training")
    baselines = ngram_baselines(learn, heldout, tokenizer.vocab_size)
    evaluator = Evaluator(model, windows, args.batch_size)
    untrained = evaluator()
    print("loss on the held-out text, in nats per token (lower is better; what counting alone gives, and this model):")
    print("  " + ", ".join(f"{name} {loss:.3f}" for name, loss in baselines.items()) + f"; untrained model {untrained:.3f}")
    prompt = opening(corpus.text, args.context_length)
    if args.verbose:
        print(f"sample: {sample(model, tokenizer, prompt, SAMPLE_TOKENS)}")

    heading(f"Training: {config.steps} steps of {config.batch_size} x {args.context_length} tokens")
    done = learn_and_watch(model, learn, config, lambda: sample(model, tokenizer, prompt, SAMPLE_TOKENS))
    notes: dict[str, Any] = {
        "corpus": {"name": corpus.name, "provenance": corpus.provenance, "licence": corpus.licence},
        "command": command_line(args),
        "steps": done,
        "tokens_seen": done * args.batch_size * args.context_length,
        "seconds": round(time.perf_counter() - began),
    }
    save(args.out, model, tokenizer, notes)  # at once: nothing after this can lose it
    trained = evaluator()
    save(args.out, model, tokenizer, notes | {"heldout_loss_nats_per_token": {**baselines, "untrained": untrained, "trained": trained}})
    if done < config.steps:
        print(f"lama: interrupted after step {done} of {config.steps}; the model as it is then was saved in {args.out}", file=sys.stderr)

    heading("What it learned")
    print(f"{prompt}{sample(model, tokenizer, prompt, 2 * SAMPLE_TOKENS)}\n")
    print(table(untrained, baselines["bigram"], trained))
    again = shlex.join(["python", "gpt.py", "-m", str(args.out), "-p", prompt.strip()])
    print(f"\nsaved in {args.out}. Continue any text with it:\n  {again}")
    if done < config.steps:
        return 130
    if not trained < untrained:
        raise LamaError(f"the trained model must beat the untrained one; got {trained:.3f} nats per token. Lower the learning rate")
    if not trained < baselines["bigram"]:
        raise LamaError(
            f"the trained model must beat the bigram baseline; got {trained:.3f} nats per token. Train for more than {done} steps"
        )
    return 0


def learn_and_watch(model: "GPT", data: Any, config: Any, sample_now: Any) -> int:
    """Train with a progress bar and four samples on the way; returns the steps done, fewer after Ctrl-C."""
    from tqdm import tqdm

    from lama.training import train

    print("compiling the training step, once; then a sample at every quarter of the way", file=sys.stderr)
    quarters = {config.steps * i // 4 for i in (1, 2, 3)}
    done = 0
    # The time left is the loop's own: tqdm's would count the compilation into every step.
    layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
    with tqdm(total=config.steps, unit="step", file=sys.stderr, dynamic_ncols=True, bar_format=layout) as bar:
        try:
            for step in train(model, data, config):
                done = step.step
                bar.set_postfix_str(
                    f"loss {step.loss:.3f}, rate {step.learning_rate:.1e}, gradient {step.gradient_norm:.2f}, "
                    f"{step.tokens_per_second:,.0f} tokens/s, {tqdm.format_interval(step.seconds_left)} left"
                )
                bar.update()
                if step.step in quarters:
                    bar.write(f"step {step.step}: loss {step.loss:.3f}  {sample_now()!r}", file=sys.stdout)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            if not done:
                raise
    return done


def sample(model: "GPT", tokenizer: "Tokenizer", prompt: str, n: int) -> str:
    from lama.generation import generate

    return str(generate(model, tokenizer, prompt, max_new_tokens=n, temperature=0.8, window=True))


def opening(text: str, context_length: int) -> str:
    """The first line of the text, cut to half a window: the prompt of the samples."""
    line = next(line for line in text.splitlines() if line.strip())
    end = "\n" if "\n" in text else ""  # a tokenizer of the text's characters knows no others
    return line[: max(1, context_length // 2)] + end


def table(untrained: float, bigram: float, trained: float) -> str:
    """The losses, and what they mean, side by side."""
    columns = (untrained, bigram, trained)
    rows = (
        ("loss, nats per token", [f"{loss:.3f}" for loss in columns]),
        ("bits per token", [f"{loss / math.log(2):.3f}" for loss in columns]),
        ("perplexity", [f"{math.exp(loss):.2f}" if loss < 20 else "-" for loss in columns]),
    )
    lines = [f"{'metric':<22}| {'untrained':>10} | {'n-gram (2)':>10} | {'trained':>10}"]
    return "\n".join(lines + [f"{name:<22}| " + " | ".join(f"{value:>10}" for value in values) for name, values in rows])


def check_out(out: Path) -> None:
    """Refuse, before hours of training, an --out that cannot be written or that holds something else."""
    from lama.checkpoints import is_own_folder

    if out.exists() and not out.is_dir():
        raise UsageError(f"--out must be a folder; got the file {out}")
    if out.is_dir() and any(out.iterdir()) and not is_own_folder(out):
        raise UsageError(f"--out must be a new folder or one that lama has saved a model in; got {out}, which holds other things")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".lama-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise LamaError(f"--out must be a folder that can be written; got {out} ({error.strerror})") from error


def command_line(args: argparse.Namespace) -> str:
    """The command that trains the same model again."""
    skip = ("run", "verb", "verbose", "out")
    words = [(f"--{name.replace('_', '-')}", str(value)) for name, value in vars(args).items() if name not in skip and value is not None]
    return shlex.join(["lama", "train", *(word for pair in words for word in pair)])


def heading(text: str) -> None:
    print(f"\n{text}", flush=True)
