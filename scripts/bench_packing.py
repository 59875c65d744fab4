"""Tokens per second of fine-tuning on conversations, packed and padded.

    python scripts/bench_packing.py [--from MODEL] [--context-length 512] [--rounds 3]

Conversations of different lengths are made of the King James Bible. Steps of both kinds are timed in turn.
Only the tokens of conversations are counted, without padding. The best round of each kind is printed.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import numpy as np

from lama.data.packages import bible_verses
from lama.training.folder import RunFolder
from lama.training.prepare import new_session
from lama.training.run import Run


def conversations(n: int) -> list[dict[str, str]]:
    rng, verses = random.Random(0), bible_verses()
    found = []
    for _ in range(n):
        some = rng.choices(verses, k=min(12, 1 + int(rng.expovariate(0.5))))
        text = " ".join(verse.text for verse in some)
        found.append({"prompt": f"Which book has this? {text}", "completion": some[0].book})
    return found


def run_steps(run: Run, n: int) -> tuple[float, int]:
    """Seconds of n steps, and their tokens."""
    steps = iter(run.trainer)
    tokens, first = 0, run.step
    for step in range(first, first + n):
        _, _, starts, _ = run.trainer.batches(step)
        # A position that is padding sees only itself, and so does the first of each conversation.
        alone = starts == np.arange(starts.shape[1])
        lonely = alone[:, :-1] & alone[:, 1:]
        tokens += int(starts.size - lonely.sum() - alone[:, -1].sum())
    began = time.perf_counter()
    for _ in range(n):
        next(steps)
    return time.perf_counter() - began, tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="model", default="lama-bpe", help="the model (default lama-bpe)")
    parser.add_argument("--context-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "talk.jsonl")
        data.write_text("".join(json.dumps(each) + "\n" for each in conversations(2000)))
        settings = {"initial": args.model, "chat": [str(data)], "context_length": args.context_length}
        settings |= {"batch_size": args.batch_size, "steps": 10_000, "template": "plain"}
        runs = {}
        for packing in (True, False):
            runs[packing] = new_session(
                RunFolder(Path(folder, str(packing))), {**settings, "packing": packing}, ""
            )
            assert isinstance(runs[packing], Run)
            run_steps(runs[packing], 3)  # the first compiles
        best = {True: 0.0, False: 0.0}
        for _ in range(args.rounds):
            for packing, run in runs.items():
                seconds, tokens = run_steps(run, args.steps)
                best[packing] = max(best[packing], tokens / seconds)
                print(f"{'packed' if packing else 'padded'}: {tokens / seconds:,.0f} tokens/s", flush=True)
    print(
        f"packed {best[True]:,.0f}, padded {best[False]:,.0f} tokens/s: {best[True] / best[False]:.2f} times"
    )


if __name__ == "__main__":
    main()
