"""Prefill and decode speed of a GPT-2 124M, and how near to the memory's speed decoding comes. Random weights.

    python scripts/bench_generate.py [--dtype float32] [--rounds 5]

Decoding one token reads every weight once, so its limit is memory bandwidth; that is measured here too, round by round
beside the model, because shared machines change speed from one second to the next.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tinygrad import Device, dtypes
from tinygrad.nn.state import get_parameters

from lama.compiler import cores, ensure_compiler
from lama.generation import Decoder
from lama.models.gpt import GPT, GPT2_CONFIGS
from lama.models.quantized import BITS, quantize_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=GPT2_CONFIGS, default="gpt2", help="the shape (default gpt2: 124M)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16", *BITS), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", type=int, default=512, help="tokens in the long prompt (default 512)")
    parser.add_argument("--decode", type=int, default=32, help="tokens decoded a round, after a prompt of 16 (default 32)")
    args = parser.parse_args()
    ensure_compiler()

    model = GPT(GPT2_CONFIGS[args.model])
    if args.dtype in BITS:
        quantize_model(model, args.dtype)
    parameters = get_parameters(model)
    for parameter in parameters if args.dtype not in BITS else []:
        parameter.replace(parameter.cast(getattr(dtypes, args.dtype)).contiguous().realize())
    read_bytes = sum(p.nbytes() for p in parameters) - model.pos_embed.weight.nbytes()  # one row of the positions is read
    decoder = Decoder(model)
    rng = np.random.default_rng(0)
    long, short = (rng.integers(model.config.vocab_size, size=(1, n)) for n in (args.prefill, 16))
    print(f"{model.describe()}; {args.dtype} on {Device.DEFAULT}; warming up")
    read = make_reader()
    for _ in range(3):
        decoder.prefill(long)
        decoder.prefill(short)
        decoder.decode(np.zeros(1))
        read()

    rounds = []
    for i in range(args.rounds):
        began = time.perf_counter()
        decoder.prefill(long)
        prefill = args.prefill / (time.perf_counter() - began)
        before = read()
        logits = decoder.prefill(short)
        began = time.perf_counter()
        for _ in range(args.decode):
            logits = decoder.decode(logits.argmax(-1))
        decode = args.decode / (time.perf_counter() - began)
        bandwidth = max(before, read())
        share = decode * read_bytes / bandwidth
        rounds.append({"prefill_tokens_s": prefill, "decode_tokens_s": decode, "read_bytes_s": bandwidth, "share_of_bandwidth": share})
        print(f"round {i + 1}: prefill {prefill:7.1f} tokens/s, decode {decode:6.2f} tokens/s = {share:.0%} of {bandwidth / 1e9:.1f} GB/s")
    medians = {key: round(statistics.median(r[key] for r in rounds), 3) for key in rounds[0]}
    print(json.dumps({"model": args.model, "dtype": args.dtype, "device": Device.DEFAULT, **medians}))


def make_reader(size: int = 1 << 28) -> Callable[[], float]:
    """A function that reads `size` bytes with numpy on all cores and returns bytes per second, the best of three."""
    parts = np.array_split(np.ones(size // 4, np.float32), cores())
    pool = ThreadPoolExecutor(cores())

    def read() -> float:
        best = float("inf")
        for _ in range(3):
            began = time.perf_counter()
            list(pool.map(np.max, parts))  # a product would hold the interpreter: one core only
            best = min(best, time.perf_counter() - began)
        return size / best

    return read


if __name__ == "__main__":
    main()
