"""Written GGUF files in llama.cpp: greedy tokens and logits as in float32 here, and the tokens of a text."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import preset_shape
from test_gguf import MODELS, TOKENS, model_of, tokenizer
from tinygrad import Tensor

import lama
from lama.checkpoints import export_gguf
from lama.generation import generate_tokens

pytestmark = pytest.mark.peers

# In a process of its own: the package ends it for a file that it cannot read.
PROGRAM = """
import json, sys
import xllamacpp
path, prompts, options = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup = path, 256, False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # float16 by default
server = xllamacpp.Server(params)
for prompt in prompts:
    greedy = {"temperature": 0, "top_k": 1, "ignore_eos": True}
    answer = server.handle_completions({"prompt": prompt, **greedy, **options})
    print(json.dumps([answer["usage"]["prompt_tokens"], answer["choices"][0]["logprobs"]["content"]]))
"""


def asked_in_llama_cpp(path: Path, prompts: list, **options) -> list[tuple[int, list[dict]]]:
    """For each prompt, the number of its tokens, and what is known of each token of the continuation."""
    pytest.importorskip("xllamacpp")
    command = [sys.executable, "-c", PROGRAM, str(path), json.dumps(prompts), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def in_llama_cpp(path: Path, prompts: list, n: int) -> list[tuple[int, bytes]]:
    """For each prompt, the number of its tokens, and the bytes of the greedy continuation."""
    found = asked_in_llama_cpp(path, prompts, n_predict=n, logprobs=1)
    return [(count, bytes(byte for token in tokens for byte in token["bytes"])) for count, tokens in found]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_llama_cpp_s(name: str, tmp_path: Path):
    model, own = model_of(**{**MODELS[name], "context_length": 256}), tokenizer(tmp_path / "tokenizer")
    export_gguf(tmp_path / "model.gguf", model, own, name)
    prompt = [int(token) for token in TOKENS[0] if token < 256]
    ours = [row[0] for row in generate_tokens(model, [prompt], 60)]
    ((count, theirs),) = in_llama_cpp(tmp_path / "model.gguf", [prompt], 60)
    assert count == len(prompt) and len(set(ours)) > 4
    text = b"".join(own.decode_bytes([token]) for token in ours if token != 256)
    found = theirs.replace(b"<|end|>", b"")
    assert text.startswith(found) and len(found) > 30  # it keeps back bytes at the end that are no character


@pytest.mark.parametrize("name", ["modern-char-cpu", "modern-char"])
def test_logits_of_presets_are_llama_cpp_s(name: str, tmp_path: Path):
    """After given tokens, since these models are often near a tie; llama.cpp's SiLU rounds to float16."""
    model, own = model_of(vocab_size=257, **preset_shape(name)), tokenizer(tmp_path / "tokenizer")
    export_gguf(tmp_path / "model.gguf", model, own, name)
    tokens = np.random.default_rng(1).integers(0, 257, 60)
    ours = model(Tensor(tokens[None])).log_softmax().numpy()[0]
    ends = [1, 2, 19, 60]
    # An "A" is forced, since a byte that ends no character comes without its numbers.
    about = {"n_predict": 1, "logprobs": 257, "logit_bias": [[65, 1000.0]]}
    found = asked_in_llama_cpp(tmp_path / "model.gguf", [tokens[:end].tolist() for end in ends], **about)
    for end, (count, (last,)) in zip(ends, found, strict=True):
        theirs = {token["id"]: token["logprob"] for token in last["top_logprobs"]}
        assert count == end and len(theirs) == 257
        np.testing.assert_allclose([theirs[i] for i in range(257)], ours[end - 1], atol=0.03)


def test_the_model_that_ships_says_the_same_in_llama_cpp(tmp_path: Path):
    model, own = lama.load("lama-bpe", offline=True)
    export_gguf(tmp_path / "model.gguf", model, own, "lama-bpe")
    texts = ["And God said unto Moses,", "In the beginning", "Why? 12  é\n\nSo be it."]
    prompts = [own.encode(text) for text in texts]
    found = in_llama_cpp(tmp_path / "model.gguf", [*prompts, *texts], 60)
    for prompt, (count, theirs), (of_text, _) in zip(prompts, found[:3], found[3:], strict=True):
        ours = [row[0] for row in generate_tokens(model, [prompt], 60, vocab_size=own.vocab_size)]
        assert count == of_text == len(prompt)
        assert theirs == own.decode_bytes(ours)
