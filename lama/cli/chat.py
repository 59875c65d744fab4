"""Talk with a model.

Talk with a model that was trained on conversations. Without a terminal, each line of standard input is a
message. Commands: /reset, /system TEXT, /save FILE, /load FILE, /regenerate, /tokens, /help.
"""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from lama.cli import AddVerb, machine, no_collection
from lama.cli.sampling import add_sampling, sampling
from lama.errors import LamaError, UsageError, check_least, first_line, note, quoted

if TYPE_CHECKING:
    from lama.generation.chat import Conversation
    from lama.tokenizers import Tokenizer
    from lama.tokenizers.chat_template import ChatTemplate

HELP = """\
/reset            start over; the system message stays
/system TEXT      set the system message, and start over
/save FILE        write the conversation as JSON
/load FILE        read a conversation that /save wrote
/regenerate       answer the last message again
/tokens           show how much of the context is used
/help             show this list
Enter sends, Alt-Enter adds a line break, Ctrl-C ends an answer, Ctrl-D leaves."""
THINK, THOUGHT = "<think>", "</think>"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def add_parser(add_verb: AddVerb) -> None:
    parser = add_verb("chat", run, __doc__)
    add = parser.add
    add("-m, --model MODEL", "a model's name, folder or file", "smollm2")
    add("--system TEXT", "the system message (default: the template's own)")
    add("--template FILE", "a chat template of jinja2, or plain for a dialogue in plain text")
    add("--no-think", "ask a model that can reason first to answer at once (enable_thinking)")
    add("-n, --max-new-tokens N", "largest number of new tokens in an answer", 1000)
    add_sampling(parser)
    machine.add_loading(parser)
    add("--revision REVISION", "branch, tag or commit to download from the hub")
    add("-v, --verbose", "print the model's size and the speed")


def run(args: argparse.Namespace) -> int:
    sampling(args)
    from lama.generation import Sampling, check_options

    check_options(args.max_new_tokens, args.seed, ())
    check_least("context", args.context, 1)
    machine.use(args)
    with no_collection():
        from lama.checkpoints import load_causal
        from lama.generation.chat import Conversation

        model, tokenizer = load_causal(args.model, **machine.loading(args))
    if args.verbose:
        note(machine.about(args.model, model))
    options = sampling(args, model.sampling)
    seed = options.pop("seed")
    conversation = Conversation(
        model,
        tokenizer,
        read_template(args, tokenizer),
        Sampling(**options),
        args.max_new_tokens,
        seed,
        on_drop=lambda n: note(f"the context is full; left out the {n} oldest messages"),
        on_whole=lambda: note("special tokens in messages are not escaped: this template changes messages"),
        options={"enable_thinking": False} if args.no_think else {},
        context=args.context,
    )
    if args.system is not None:
        conversation.messages.append({"role": "system", "content": args.system})
    is_terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()

    def answer(line: str) -> None:
        if line.startswith("/"):
            command(conversation, line, args.verbose)
        elif line.strip():
            show(conversation, conversation.ask(line), args.verbose)

    if not is_terminal:
        for line in piped_lines():
            answer(line)
        return 0
    note("Enter sends a message, /help lists commands, Ctrl-D leaves")
    for line in typed_lines():
        try:
            until_interrupted(answer, line)
        except UsageError as error:
            note(str(error))
    return 0


def until_interrupted(answer: Callable[[str], None], line: str) -> None:
    """Answer a line. Ctrl-C ends only this answer, however often it is pressed."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    try:
        signal.signal(signal.SIGINT, stop)
        try:
            answer(line)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt as interrupt:
        if type(interrupt) is not KeyboardInterrupt:
            raise


def read_template(args: argparse.Namespace, tokenizer: "Tokenizer") -> "ChatTemplate":
    """The template that --template names, or the model's. Raises LamaError."""
    from lama.generation.chat import NO_TEMPLATE
    from lama.tokenizers.chat_template import ChatTemplate, plain_template, template_of

    own = template_of(tokenizer)
    if args.template == "plain":
        return plain_template(tokenizer)
    if args.template is not None:
        from lama.files import read_file

        return ChatTemplate(
            read_file(Path(args.template)).decode("utf-8", "replace"), own.tokens if own else {}
        )
    if own is None:
        raise LamaError(f"{NO_TEMPLATE}, --template plain")
    return own


def typed_lines() -> Iterator[str]:
    """Messages typed in a terminal, with a history. Between them SIGINT is ignored."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    from lama.host import cache_folder

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    history: History = InMemoryHistory()
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        history = FileHistory(str(cache_folder() / "chat_history"))
    except OSError as error:
        note(f"messages are not remembered: {first_line(error)}")
    session: PromptSession[str] = PromptSession(history=history, key_bindings=keys, multiline=True)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is a key for the session
    try:
        while True:
            try:
                yield session.prompt("> ", handle_sigint=False)
            except KeyboardInterrupt as interrupt:
                if type(interrupt) is not KeyboardInterrupt:
                    raise
                continue  # drops the line
            except EOFError:
                return
    finally:
        signal.signal(signal.SIGINT, before)


def piped_lines() -> Iterator[str]:
    """Yield the lines of standard input. Raises UsageError if it is closed, LamaError if it is not UTF-8."""
    if sys.stdin is None:
        raise UsageError("standard input must be open; got none")
    for line in sys.stdin.buffer:
        try:
            yield line.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise LamaError(f"messages must be UTF-8 text; got byte 0x{line[error.start]:02x}") from None


def show(conversation: "Conversation", pieces: Iterable[str], verbose: bool) -> None:
    """Print an answer as it comes."""
    dim = sys.stdout.isatty()
    try:
        for piece in pieces:
            if dim:
                piece = piece.replace(THINK, DIM + THINK).replace(THOUGHT, THOUGHT + PLAIN)
            print(piece, end="", flush=True)
    finally:
        print(PLAIN if dim else "", flush=True)
    answer = conversation.last
    if answer is None:
        return
    if answer.finish_reason == "context":
        note("the context is full; /reset starts over")
    if verbose and len(answer.token_times) > 1:
        first, last = answer.token_times[0], answer.token_times[-1]
        rate = (len(answer.token_times) - 1) / max(last - first, 1e-9)
        note(f"first token after {first:.2f} s, then {rate:.1f} tokens/s")


def command(conversation: "Conversation", line: str, verbose: bool) -> None:
    """Run a command that begins with /. Raises UsageError."""
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    commands: dict[str, Callable[[], None]] = {
        "/reset": lambda: reset(conversation, None),
        "/system": lambda: reset(conversation, rest),
        "/save": lambda: save(conversation, rest),
        "/load": lambda: load(conversation, rest),
        "/regenerate": lambda: show(conversation, conversation.regenerate(), verbose),
        "/tokens": lambda: tokens(conversation),
        "/help": lambda: print(HELP, flush=True),
    }
    if name not in commands:
        raise UsageError(f"a command must be one of {', '.join(commands)}; got {quoted(name)}")
    commands[name]()


def reset(conversation: "Conversation", system: str | None) -> None:
    """Start over with this system message; None keeps the present one."""
    conversation.messages = [each for each in conversation.messages[:1] if each["role"] == "system"]
    if system is not None:
        conversation.messages = [{"role": "system", "content": system}] if system else []


def tokens(conversation: "Conversation") -> None:
    used, context = len(conversation.ids(False)), conversation.context
    print(f"{used:,} of {context:,} tokens", flush=True)


def save(conversation: "Conversation", name: str) -> None:
    from lama.atomic import write_atomically

    if not name:
        raise UsageError("/save must name a file; got none")
    content = json.dumps({"messages": conversation.messages}, ensure_ascii=False, indent=1)
    try:
        write_atomically(Path(name), content.encode())
    except UsageError:
        raise
    except LamaError as error:
        raise UsageError(str(error)) from None
    note(f"wrote {len(conversation.messages)} messages to {name}")


def load(conversation: "Conversation", name: str) -> None:
    from lama.files import field, read_object

    if not name:
        raise UsageError("/load must name a file; got none")
    try:
        messages = field(read_object(Path(name)), "messages", list, name)
        found = [{key: field(each, key, str, name) for key in ("role", "content")} for each in messages]
    except (LamaError, AttributeError, TypeError) as error:
        raise UsageError(first_line(error)) from None
    conversation.messages = found
    note(f"read {len(found)} messages from {name}")
