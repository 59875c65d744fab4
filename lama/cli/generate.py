"""Continue a prompt.

Continue a prompt with GPT-2 or any model lama can load.
"""

import argparse
import json
import re
import sys
import time
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from lama.cli import AddVerb, exit_code, machine
from lama.errors import LamaError, UsageError, check_least, note, quoted

if TYPE_CHECKING:
    from lama.generation import Generation
    from lama.models.gpt import GPT
    from lama.tokenizers import Tokenizer

REPORTED = ("text", "tokens", "finish_reason")  # of each sample, with --json
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}  # after a backslash; and uXXXX
# Probable escapes. In a prompt, a backslash may belong to LaTeX or a path, such as \nabla or \temp.
MEANT = {
    "-p": re.compile(r"\\(?:[ntr](?![a-z])|u[0-9a-fA-F]{4})"),
    "--stop": re.compile(r"\\(?:[ntr]|u[0-9a-fA-F]{4})"),
}


def add_parser(add_verb: AddVerb) -> None:
    parser = add_verb("generate", run, __doc__)
    add = parser.add
    add("-p, --prompt PROMPT", "the text to continue; - reads it from standard input")
    add("--prompt-file FILE", "read the prompt from a UTF-8 file")
    models = "gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder or a file"
    add("-m, --model MODEL", f"{models} (default: gpt2, or the bundled model lama-bpe)")
    add("-n, --max-new-tokens N", "largest number of new tokens", 100)
    add("--temperature T", "0 is greedy", 0.8)
    add("--top-k K", "sample from the K likeliest tokens only (default 0: all)", 0)
    add("--top-p P", "sample from the likeliest tokens that sum to P (default 1: all)", 1.0)
    add("--min-p P", "sample from tokens at least P times as likely as the likeliest", 0.0)
    add("--repetition-penalty R", "above 1 makes tokens seen before less likely", 1.0)
    add("--seed SEED", "the same seed gives the same text", 0)
    add("--stop TEXT", "end before this text; can be given several times", action="append")
    add("--escape", r"read \n, \t, \r, \\ and \uXXXX in -p and --stop as in a string of JSON")
    add("--num-samples N", "number of continuations, with seeds SEED, SEED+1, ...", 1)
    add("--window", "when the context is full, drop its older half and continue")
    machine.add_loading(parser)
    add("--revision REVISION", "branch, tag or commit to download from the hub")
    add("--no-stream", "print the text when it is complete")
    add("--json", "print one JSON object instead of the text")
    add("-v, --verbose", "print the model's size and the speed")


def run(args: argparse.Namespace) -> int:
    prompt = read_prompt(args)
    stops = [read_escapes(args, "--stop", text) for text in args.stop or ()]
    check_least("num_samples", args.num_samples, 1)
    from lama.generation import Sampling, check_options, generate
    from lama.generation.engine import WINDOW

    # Checked before a model is loaded or downloaded.
    check_options(args.max_new_tokens, args.seed, stops)
    sampling = {name: getattr(args, name) for name in SAMPLING}
    Sampling(**sampling)
    machine.use(args)

    started = time.perf_counter()
    name, model, tokenizer = load_model(args)
    load_seconds = time.perf_counter() - started
    if args.verbose:
        note(f"{machine.about(args, name, model)}, loaded in {load_seconds:.2f} s")
    context = f"context of {model.config.context_length} tokens"
    samples, code = [], 0
    for i in range(args.num_samples):
        try:
            generation = generate(
                model,
                tokenizer,
                prompt,
                seed=args.seed + i,
                max_new_tokens=args.max_new_tokens,
                stop=stops,
                window=args.window,
                on_slide=lambda n: note(f"{context} is full; continued with the last {n}"),
                **sampling,
            )
        except UsageError as error:
            raise UsageError(str(error).replace(WINDOW, "pass --window")) from None
        samples.append(generation)
        try:
            show(generation, prompt, args)
        except KeyboardInterrupt as stop:
            how, code = str(stop) or "interrupted", exit_code(stop)
            generation.finish_reason = how
            if not args.json:
                print(prompt + generation.text if args.no_stream else "", flush=True)
            note(f"{how} after {len(generation.tokens)} tokens")
            break
    if any(sample.finish_reason == "context" for sample in samples):
        note(f"the {context} is full; --window continues")
    timing = speed(samples, load_seconds)
    if args.json:
        found = {
            "model": name,
            "prompt": prompt,
            "prompt_tokens": samples[0].prompt_tokens,
            "samples": [{field: getattr(s, field) for field in REPORTED} for s in samples],
            "timing": timing,
        }
        print(json.dumps(found, ensure_ascii=False))
    elif args.verbose:
        rate = f", then {timing['tokens_per_s']} tokens/s" if timing["tokens_per_s"] else ""
        note(f"first token after {timing['first_token_s']} s{rate}")
    return code


def read_prompt(args: argparse.Namespace) -> str:
    """Read the prompt. Raises UsageError unless exactly one source is given, LamaError for other bytes."""
    if (args.prompt is None) == (args.prompt_file is None):
        raise UsageError("give one prompt: -p TEXT, -p - for standard input, or --prompt-file FILE")
    if args.prompt_file is not None:
        where = args.prompt_file
        try:
            raw = Path(where).read_bytes()
        except OSError as error:
            raise LamaError(f"prompt file must be readable; got {where} ({error.strerror})") from error
    elif args.prompt == "-":
        if sys.stdin is None:
            raise UsageError("standard input must be open for -p -; got none. Give the prompt with -p TEXT")
        if sys.stdin.isatty():
            note("reading the prompt from the terminal; Ctrl-D on an empty line ends it")
        raw, where = sys.stdin.buffer.read(), "standard input"
    else:
        text = read_escapes(args, "-p", args.prompt)
        raw, where = text.encode("utf-8", "surrogateescape"), "the command line"
    try:
        prompt = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"byte 0x{raw[error.start]:02x} at offset {error.start} of {where}"
        raise LamaError(f"prompt must be UTF-8 text; got {got}") from error
    if not prompt:
        raise UsageError(f"prompt must not be empty; got nothing from {where}. Give some text to continue")
    return prompt


def read_escapes(args: argparse.Namespace, option: str, text: str) -> str:
    """Read an option's escapes with --escape; without it, print a note for a probable escape.

    Raises UsageError for an unknown escape.
    """
    if not args.escape:
        if found := MEANT[option].search(text):
            note(f"{option} contains a literal {found[0]}; --escape reads it as an escape sequence")
        return text

    def character(found: re.Match[str]) -> str:
        if found[2]:
            return chr(int(found[2], 16))
        if found[1] not in ESCAPES:
            got = f"{quoted(found[0], plain=True)} in {option}"
            raise UsageError(rf"--escape reads \n, \t, \r, \\ and \uXXXX; got {got}")
        return ESCAPES[found[1]]

    text = re.sub(r"\\(u([0-9a-fA-F]{4})|.?)", character, text, flags=re.DOTALL)
    try:  # two \uXXXX may be the halves of one character
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        got = f"half of a character, {quoted(text)}"
        raise UsageError(f"{option} must be valid Unicode with --escape; got {got}") from None


def load_model(args: argparse.Namespace) -> "tuple[str, GPT, Tokenizer]":
    """(name, model, tokenizer) of the chosen model, or else of GPT-2, or else of the bundled model."""
    from lama.checkpoints import EMBEDDED, NotFound, load_causal

    options = machine.loading(args)
    if args.model is not None:
        return args.model, *load_causal(args.model, **options)
    try:
        return "gpt2", *load_causal("gpt2", **options)
    except NotFound as error:
        if args.revision:
            raise
        if args.verbose:
            note(str(error))
        advice = "put its config.json and model.safetensors into weights/gpt2/"
        lacking = "GPT-2 weights not found and not downloadable"
        note(f"{lacking}; using the bundled model {EMBEDDED}. For GPT-2, {advice}")
        return EMBEDDED, *load_causal(EMBEDDED, **options)


def show(generation: "Generation", prompt: str, args: argparse.Namespace) -> None:
    whole = [str(generation)] if args.json or args.no_stream else generation
    if args.json:
        return
    for piece in chain([prompt], whole):
        print(piece, end="", flush=True)
    print(flush=True)


def speed(samples: "list[Generation]", load_seconds: float) -> dict[str, float | None]:
    """Seconds to load and to the first token, and tokens a second after it (None for a single token)."""
    timed = [s.token_times for s in samples if s.token_times]  # an interrupted sample may have none
    later = sum(len(times) - 1 for times in timed)
    seconds = sum(times[-1] - times[0] for times in timed)
    return {
        "load_s": round(load_seconds, 3),
        "first_token_s": round(timed[0][0], 3) if timed else None,
        "tokens_per_s": round(later / seconds, 2) if later else None,
    }
