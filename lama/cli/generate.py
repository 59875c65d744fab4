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

from lama.cli import AddVerb, exit_code, machine, no_collection
from lama.cli.sampling import add_sampling, sampling
from lama.errors import LamaError, UsageError, check_least, note, quoted

if TYPE_CHECKING:
    from lama.generation import Generation
    from lama.models.gpt import GPT
    from lama.tokenizers import Tokenizer

REPORTED = ("text", "tokens", "finish_reason")  # of each sample, with --json
SMOLLM2 = "smollm2"
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
    models = "gpt2, gpt2-medium, gpt2-large, gpt2-xl, smollm2, a folder or a file"
    add("-m, --model MODEL", f"{models} (default: gpt2, else smollm2, else the bundled model lama-bpe)")
    add("-n, --max-new-tokens N", "largest number of new tokens", 100)
    add_sampling(parser)
    add("--stop TEXT", "end before this text; can be given several times", action="append")
    add("--escape", r"read \n, \t, \r, \\ and \uXXXX in -p and --stop as in a string of JSON")
    add("--num-samples N", "number of continuations, with seeds SEED, SEED+1, ...", 1)
    add("--chat", "answer the prompt with the model's chat template, instead of continuing it")
    add("--raw", "continue the prompt, also if SmolLM2 is the default model, which would answer it")
    add("--window", "when the context is full, drop its older half and continue")
    machine.add_loading(parser)
    add("--revision REVISION", "branch, tag or commit to download from the hub")
    add("--no-stream", "print the text when it is complete")
    add("--json", "print one JSON object instead of the text")
    add("-v, --verbose", "print the model's size and the speed")


def run(args: argparse.Namespace) -> int:
    if args.chat and args.raw:
        raise UsageError("--chat and --raw exclude each other; give one of them")
    prompt = read_prompt(args)
    stops = [read_escapes(args, "--stop", text) for text in args.stop or ()]
    check_least("num_samples", args.num_samples, 1)
    check_least("context", args.context, 1)
    with no_collection():
        from lama.generation import check_options, generate
        from lama.generation.decoder import context_of
        from lama.generation.engine import WINDOW

        # Checked before a model is loaded or downloaded.
        check_options(args.max_new_tokens, args.seed, stops)
        sampling(args)
        machine.use(args)

        started = time.perf_counter()
        name, model, tokenizer = load_model(args)
        load_seconds = time.perf_counter() - started
    if args.verbose:
        note(f"{machine.about(name, model)}, loaded in {load_seconds:.2f} s")
    options = sampling(args, model.sampling)
    given, shown = prompt_of(args, tokenizer, prompt), "" if args.chat else prompt
    context = f"context of {context_of(model, args.context)} tokens"
    samples, code = [], 0
    for i in range(args.num_samples):
        try:
            generation = generate(
                model,
                tokenizer,
                given,
                max_new_tokens=args.max_new_tokens,
                stop=stops,
                window=args.window,
                context=args.context,
                on_slide=lambda n: note(f"{context} is full; continued with the last {n}"),
                **{**options, "seed": args.seed + i},
            )
        except UsageError as error:
            raise UsageError(str(error).replace(WINDOW, "pass --window")) from None
        samples.append(generation)
        try:
            show(generation, shown, args)
        except KeyboardInterrupt as stop:
            how, code = str(stop) or "interrupted", exit_code(stop)
            generation.finish_reason = how
            if not args.json:
                print(shown + generation.text if args.no_stream else "", flush=True)
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
    """Read the prompt. Raises UsageError unless one source is given, LamaError for text that is not UTF-8."""
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
    """(name, model, tokenizer) of the chosen model, else of GPT-2, of SmolLM2, or of the bundled model.

    SmolLM2 is trained on conversations: its chat template is applied, unless --raw is given.
    """
    from lama.checkpoints import EMBEDDED, NotFound, load_causal

    if args.model is None and args.adapter is not None:  # it names its model
        args.model, args.adapter = args.adapter, None
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
    advice = "For GPT-2, put its config.json and model.safetensors into weights/gpt2/"
    lacking = "GPT-2 weights not found and not downloadable"
    try:
        found = load_causal(SMOLLM2, **options)
    except NotFound as error:
        if args.verbose:
            note(str(error))
        note(f"{lacking}, nor SmolLM2; using the bundled model {EMBEDDED}. {advice}")
        return EMBEDDED, *load_causal(EMBEDDED, **options)
    args.chat = args.chat or not args.raw
    how = "answering with its chat template; --raw continues the text" if args.chat else "continuing the text"
    note(f"{lacking}; using SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), {how}. {advice}")
    return SMOLLM2, *found


def prompt_of(args: argparse.Namespace, tokenizer: "Tokenizer", prompt: str) -> str | list[int]:
    """The prompt, with --chat as a message in the model's chat template. Raises LamaError."""
    if not args.chat:
        return prompt
    from lama.generation.chat import template_for
    from lama.tokenizers.chat_template import encode_chat

    return encode_chat(tokenizer, template_for(tokenizer), [{"role": "user", "content": prompt}])


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
