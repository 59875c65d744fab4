"""Answer requests over HTTP, with OpenAI's API.

Many requests are answered at the same time, and / is a page to chat and to look inside the model. Needs the
packages of pip install 'lama[serve]'.
"""

import argparse
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from lama.cli import AddVerb, machine
from lama.errors import LamaError, UsageError, check_least, note

if TYPE_CHECKING:
    from lama.server.service import Backend, Service

LARGEST_CONTEXT = 2048  # of a row, unless --context says otherwise
CHUNK = 64  # prompt tokens computed between two decoding steps of other requests
DRAFTS = 3
LEAST = {"rows": 1, "context": 1, "queue": 0, "max_tokens": 1, "max_n": 1, "max_body": 1, "spare": 0}


def add_parser(add_verb: AddVerb) -> None:
    parser = add_verb("serve", run, __doc__)
    add = parser.add
    add("-m, --model MODEL", "a model's name, folder or file", "smollm2")
    add("--host HOST", "address to listen on; one that other machines can reach needs a key", "127.0.0.1")
    add("--port PORT", "port to listen on; 0 chooses a free one", 8080)
    add("--rows N", "requests answered at the same time", 8)
    context = f"tokens of a prompt and its answer (default: the model's, at most {LARGEST_CONTEXT})"
    add("--context N", context, type=int)
    add("--spare N", "additional cache rows, which keep the prompts of finished requests", 4)
    add("--queue N", "requests that may wait for a row (default: 4 for each row)", type=int)
    add("--max-tokens N", "largest number of new tokens of an answer (default: the context)", type=int)
    add("--max-n N", "largest number of answers to a request, over all of its prompts", 128)
    add("--max-body BYTES", "largest size of a request", 4 << 20)
    add("--timeout SECONDS", "longest time that a request may take", 600.0)
    add("--api-key-file FILE", "file with one key on each line; a request needs one of them")
    add("--no-key", "let everyone who reaches the address use the server")
    add("--allow-origin ORIGIN", "let web pages of this origin use it; can be repeated", action="append")
    add("--no-internals", "refuse requests for activations, the logit lens and attention")
    add("--cache-dir DIR", "keep the cache of prompts in this folder, for the next start")
    add("--cache-size GB", "largest size of that folder", 10.0)
    add("--no-drafts", "do not draft the next tokens from earlier repetitions in the text")
    machine.add_loading(parser, several=True)
    add("--revision REVISION", "branch, tag or commit to download from the hub")


def run(args: argparse.Namespace) -> int:
    for name, least in LEAST.items():
        check_least(name, getattr(args, name), least)
    if not 0 <= args.port < 65536:
        raise UsageError(f"port must be from 0 to 65535; got {args.port}")
    if not 0 < args.timeout < float("inf"):
        raise UsageError(f"timeout must be above 0 seconds; got {args.timeout}")
    machine.use(args)
    from lama.server.access import Access, is_loopback, read_keys
    from lama.server.service import Limits, Service
    from lama.server.serving import listen, make_server, url_of

    keys = read_keys(Path(args.api_key_file)) if args.api_key_file is not None else frozenset[str]()
    if not keys and not args.no_key and not is_loopback(args.host):
        got = f"got --host {args.host}. Give --api-key-file FILE, or --no-key to let everyone in"
        raise UsageError(f"a server that others can reach must have a key; {got}")
    access = Access(args.host, keys, frozenset(args.allow_origin or ()))
    service = Service(Limits(args.max_tokens, args.max_n, args.max_body, args.timeout), not args.no_internals)
    with listen(args.host, args.port) as sock:
        server = make_server(service, access, lambda: load(args, service, keys, url_of(sock, args.host)))
        server.run(sockets=[sock])
    if service.is_loaded:
        service.backend.worker.stop()
        service.backend.worker.engine.close()
    if server.failure is not None:
        raise server.failure
    return 0


def load(args: argparse.Namespace, service: "Service", keys: Collection[str], url: str) -> "Backend":
    """Load the model and its adapters, and start the worker. Raises LamaError, also for too little memory."""
    from lama.checkpoints import base_of, find, is_adapter, load_adapter, load_causal, open_checkpoint
    from lama.checkpoints.adapters import with_notes
    from lama.generation.decoder import Runner
    from lama.generation.engine import Engine
    from lama.generation.engines import Engines
    from lama.generation.exact import exact_obstacle
    from lama.generation.prefix_store import PrefixStore
    from lama.models.adapters import sharing_weights
    from lama.models.gpt import GPTConfig
    from lama.server.service import Backend
    from lama.server.worker import Worker
    from lama.tokenizers.chat_template import template_of

    started = time.perf_counter()
    adapters = [Path(each) for each in args.adapter or ()]
    if first := int(is_adapter(Path(args.model))):  # it names its model
        adapters, args.model = [Path(args.model), *adapters], base_of(Path(args.model))
    names = [each.resolve().name for each in adapters]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"adapters must have different names, those of their folders; got two {twice[0]}")
    checkpoint = open_checkpoint(find(args.model, offline=args.offline, revision=args.revision).path)
    config = checkpoint.config
    if not isinstance(config, GPTConfig):
        raise LamaError(f"lama serve needs a model that continues texts; got a {checkpoint.kind}")
    context = args.context or min(config.context_length, LARGEST_CONTEXT)
    if context > config.context_length:
        raise UsageError(f"--context must be at most {config.context_length}, the model's; got {context}")
    rows = args.rows + args.spare
    cache = 2 * config.n_layers * rows * context * config.n_kv_heads * config.d_head * 4
    cache *= 1 + len(adapters)
    many = f", as many for each adapter, {', '.join(names)}," if names else ""
    size = f"{rows} rows of {context:,} tokens{many} take {cache / 1e6:,.0f} MB"
    check_memory(cache + os.path.getsize(checkpoint.source), size)
    on = f"internals {'on' if service.internals else 'off'}, keys {'required' if keys else 'not required'}"
    note(f"{args.model} at {url}: {size}; {on}")
    note("loading; the first start compiles too, for up to a minute")
    model, tokenizer = load_causal(args.model, **machine.loading(args) | {"adapter": None})
    models, tokenizers = [model], [tokenizer]
    for path in adapters:
        models.append(sharing_weights(model))
        load_adapter(path, models[-1])
        tokenizers.append(with_notes(path, models[-1], tokenizer))
    drafts = 0 if args.no_drafts else DRAFTS
    engines = []
    for each in models:
        runner = Runner(each, rows, context=context, sizes=[1 << i for i in range(args.rows.bit_length())])
        store = None
        if args.cache_dir is not None:
            store = PrefixStore(Path(args.cache_dir), runner, int(args.cache_size * 1e9 / len(models)))
        engine = Engine(
            each,
            args.rows,
            tokenizer.vocab_size,
            runner=runner,
            chunk=CHUNK,
            reuse=True,
            drafts=drafts,
            store=store,
        )
        engine.warm_up()
        engines.append(engine)
    if obstacle := exact_obstacle(model):
        note(f"rare tokens of an answer may depend on the other requests in the batch: {obstacle}")
    queue = 4 * args.rows if args.queue is None else args.queue
    worker = Worker(Engines(engines) if adapters else engines[0], queue)
    shown = [Path(args.model).name]
    shown += [f"{shown[0]}:{name}" for name in names]
    backends = [
        Backend(name, each, own, worker, template_of(own), engine=i)
        for i, (name, each, own) in enumerate(zip(shown, models, tokenizers, strict=True))
    ]
    service.adapted = [each for i, each in enumerate(backends) if i != first]
    note(f"ready after {time.perf_counter() - started:.1f} s; Ctrl-C ends")
    return backends[first]


def check_memory(needed: int, size: str) -> None:
    """Raise LamaError if more bytes are needed than are free."""
    from lama.host import free_bytes

    if (free := free_bytes()) and needed > free:
        got = f"with the weights {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free"
        raise LamaError(f"the cache must fit the memory; {size}, {got}. Lower --rows, --spare or --context")
