"""Measure the effect of rounding weights: bytes of each GGUF type, and SmolLM2's perplexity.

    python scripts/bench_smollm2.py [--only bytes,cost] [--json FILE]

bytes: the bytes of a weight in the file and in lama, for each type of GGUF that lama reads. Types that are
rounded a second time have their error.

cost: the perplexity of the same text, windows and tokens, with the weights rounded by each engine from the
same float32. Also the error of the first 256 tokens' logits, as a share of their spread. The peer is
`pip install llama-cpp-python`, which compiles, as only it gives all logits.

The model is found or fetched as by `lama generate -m smollm2`. Prints Markdown. Its
speed is in bench_cpu.py.
"""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lama.atomic import atomic_write
from lama.host import cores

TASKS = ("bytes", "cost")
CHARACTERS, CONTEXT, STRIDE = 16_000, 1024, 512  # of the text whose perplexity is computed, and its windows
SHOWN = 256  # tokens whose logits are compared
FLOATS = " --float-activations"  # ends the name of weights that multiply activations as they are
MATRIX = 2048  # rows and columns of the matrices whose bytes are counted


# --- engines: each is a process that prints a line of JSON


def lama_perplexity(path: str, dtype: str, logits: str) -> dict[str, float]:
    """Perplexity, and the first tokens' logits to a file."""
    from lama.checkpoints import load_causal
    from lama.evaluation.sliding import perplexity
    from lama.generation import Runner

    held = dtype.removesuffix(FLOATS)
    model, tokenizer = load_causal(
        path, dtype=None if held == "file" else held, float_activations=held != dtype
    )
    tokens = np.array([tokenizer.encode(text())[:SHOWN]])
    np.save(logits, Runner(model, 1, context=SHOWN).feed(np.array([0]), tokens, "every")[0])
    score = perplexity(model, tokenizer, text(), STRIDE, CONTEXT)
    return {"perplexity": score.perplexity, "tokens": score.tokens}


def peer_perplexity(path: str, dtype: str, shown: str) -> dict[str, float]:
    """The same in the same windows. Rounds a float32 file to `dtype` first, unless that is `file`."""
    import llama_cpp

    from lama.checkpoints import find, load_tokenizer
    from lama.evaluation.sliding import strided_windows

    with tempfile.TemporaryDirectory() as folder:
        if dtype != "file":
            rounded = f"{folder}/rounded.gguf"
            params = llama_cpp.llama_model_quantize_default_params()
            params.ftype, params.pure = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{dtype}"), False
            if llama_cpp.llama_model_quantize(path.encode(), rounded.encode(), params):
                raise SystemExit(f"llama.cpp cannot round {path} to {dtype}")
            path = rounded
        model = llama_cpp.Llama(
            path, n_ctx=CONTEXT, n_batch=CONTEXT, logits_all=True, n_threads=cores(), verbose=False
        )
        tokens = load_tokenizer(find("smollm2").path).encode(text())
        model.eval(tokens[:SHOWN])
        np.save(shown, model.scores[:SHOWN])
        nats, scored = 0.0, 0
        for begin, end, n in strided_windows(len(tokens), CONTEXT, STRIDE):
            model.reset()
            model.eval(tokens[begin:end])
            logits = model.scores[end - begin - n - 1 : end - begin - 1].astype(np.float64)
            most = logits.max(-1)
            likely = logits[np.arange(n), tokens[end - n : end]]
            nats += float((most + np.log(np.exp(logits - most[:, None]).sum(-1)) - likely).sum())
            scored += n
    return {"perplexity": math.exp(nats / scored), "tokens": scored}


def text() -> str:
    from lama.data import default_corpus

    return default_corpus().text[:CHARACTERS]


WORKERS: dict[str, Callable[[str, str, str], dict[str, float]]] = {
    each.__name__: each for each in (lama_perplexity, peer_perplexity)
}


def run(worker: str, path: Path | str, dtype: str, logits: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", worker, str(path), dtype, str(logits)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{worker} must end well; got {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# --- tables


def count_bytes() -> list[dict[str, Any]]:
    from tinygrad import Tensor

    from lama.checkpoints.gguf import KINDS, tensor_at
    from lama.kernels import Quantized
    from lama.ops import dequantize, quantize

    rows, rng = [], np.random.default_rng(0)
    print(
        "| type | bytes per weight, file | lama | ratio | rounded a second time, rms |\n|---|---|---|---|---|"
    )
    for kind in KINDS.values():
        if kind.integers is None:
            continue
        blocks = rng.integers(0, 256, (MATRIX * MATRIX // kind.numbers, kind.size), dtype=np.uint8)
        for at in (208,) if kind.name == "Q6_K" else (0, 2) if kind.name[-1] in "1K" else (0,):
            blocks[:, at : at + 2] = np.float16([0.01]).view(np.uint8)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "blocks"
            path.write_bytes(blocks.tobytes())
            tensor, error = tensor_at(path, "w", kind, (MATRIX, MATRIX), 0), 0.0
            if tensor.exact is None:
                read = tensor.read()
                weight = quantize(Tensor(read).realize(), 8)
                error = math.sqrt(
                    np.square(dequantize(weight).numpy() - read).mean() / np.square(read).mean()
                )
            else:
                weight = Quantized(*(Tensor(part.read()) for part in tensor.exact), MATRIX)
        file = kind.size / kind.numbers
        ours = sum(part.nbytes() for part in weight.tensors()) / MATRIX**2
        rows.append({"type": kind.name, "file": file, "lama": ours, "error": error})
        shown = f"{error:.2%}" if error else "no"
        print(f"| {kind.name} | {file:.4f} | {ours:.4f} | {ours / file:.3f} | {shown} |")
    return rows


def cost(source: str, float32: Path) -> list[dict[str, Any]]:
    lama = ("float32", "int8", f"int8{FLOATS}", "int4", f"int4{FLOATS}", "file", f"file{FLOATS}")
    work = [("lama", "lama_perplexity", source, dtype) for dtype in lama]
    if importlib.util.find_spec("llama_cpp"):
        work += [("llama.cpp", "peer_perplexity", str(float32), dtype) for dtype in ("F32", "Q8_0", "Q4_0")]
        work.append(("llama.cpp", "peer_perplexity", source, "file"))
    rows: list[dict[str, Any]] = []
    exact, logits = None, float32.with_suffix(".npy")
    for engine, worker, path, dtype in work:
        score = run(worker, path, "file" if dtype == "F32" else dtype, logits)
        found = np.load(logits).astype(np.float64)
        found -= found.mean(-1, keepdims=True)  # adding a number to all logits of a token changes nothing
        exact = found if exact is None else exact
        error = math.sqrt(np.square(found - exact).mean() / np.square(exact).mean())
        rows.append({"engine": engine, "weights": dtype.replace("file", "Q4_1"), **score, "error": error})
    print(f"{rows[0]['tokens']:,} tokens of the Bible's beginning, windows of {CONTEXT}, stride {STRIDE}")
    print("| engine | weights | perplexity | beside float32 | error of logits |\n|---|---|---|---|---|")
    for row in rows:
        rise = f"{row['perplexity'] / rows[0]['perplexity'] - 1:+.2%}"
        shown = f"{row['engine']} | {row['weights']} | {row['perplexity']:.4f} | {rise} | {row['error']:.2%}"
        print(f"| {shown} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default=",".join(TASKS), help="tasks, separated by commas")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, *words = args.worker
        print(json.dumps(WORKERS[name](*words)))
        return
    tasks = set(args.only.split(","))
    if wrong := tasks - set(TASKS):
        parser.error(f"--only must name tasks among {', '.join(TASKS)}; got {', '.join(sorted(wrong))}")
    from lama.checkpoints import export_gguf, find, load_causal

    found: dict[str, Any] = {}
    if "bytes" in tasks:
        found["bytes"] = count_bytes()
    if "cost" in tasks:
        source = find("smollm2").path
        with tempfile.TemporaryDirectory() as folder:
            float32 = Path(folder) / "float32.gguf"
            export_gguf(float32, *load_causal(source, dtype="float32"), "SmolLM2")
            found["cost"] = cost(str(source), float32)
    if args.json:
        with atomic_write(args.json) as file:
            file.write(json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    main()
