"""Perplexity is transformers' and HellaSwag and LAMBADA are the harness's: by hand, by plain numpy, and by
transformers where installed.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import numpy_gpt2, random_gpt2
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama.checkpoints import load_model
from lama.errors import LamaError, UsageError
from lama.evaluation.likelihood import Row, Scorer, by_width, score
from lama.evaluation.published import PUBLISHED, SIZES
from lama.evaluation.sliding import TextScore, perplexity, strided_windows
from lama.evaluation.tasks import (
    TASKS,
    Answer,
    BenchmarkItem,
    TaskScore,
    encode_pair,
    evaluate,
    hellaswag_metrics,
    lambada_metrics,
    read_examples,
    without_markup,
)
from lama.models.gpt import GPT, GPTConfig
from lama.tokenizers import CharacterTokenizer, gpt2_tokenizer

ALPHABET = " abcdefghijklmnopqrstuvwxyzé."
TOKENIZER = CharacterTokenizer(ALPHABET)
CONTEXT = 37
CONFIG = random_gpt2.make_config(
    vocab_size=TOKENIZER.vocab_size, n_positions=CONTEXT, n_embd=18, n_layer=1, n_head=3
)
WEIGHTS = random_gpt2.make_weights(CONFIG, seed=5, std=0.3)
TEXT = "".join(np.random.default_rng(0).choice(list(ALPHABET), 101))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_gpt2.write_folder(tmp_path_factory.mktemp("gpt2"), CONFIG, WEIGHTS)


@pytest.fixture(scope="module")
def model(folder: Path) -> GPT:
    return load_model(folder)


def numpy_log_probs(tokens: list[int]) -> np.ndarray:
    """log p of each token but the first given all before it, in float64; with how likely every token was: (T
    - 1, V).
    """
    exact = {name: value.astype(np.float64) for name, value in WEIGHTS.items()}
    logits = numpy_gpt2.logits(exact, CONFIG, np.array([tokens[:-1]]))[0]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def picked(tokens: list[int]) -> np.ndarray:
    return np.take_along_axis(numpy_log_probs(tokens), np.array(tokens[1:])[:, None], -1)[:, 0]


# --- log-likelihood


def test_rows_of_all_lengths_score_as_each_does_alone(model: GPT):
    rng = np.random.default_rng(1)
    rows = [
        Row(rng.integers(0, TOKENIZER.vocab_size, n).tolist(), k)
        for n, k in ((38, 37), (2, 1), (11, 3), (38, 1), (20, 19))
    ]
    found = {scores.index: scores for scores in score(model, rows)}
    assert sorted(found) == list(range(len(rows)))
    for i, row in enumerate(rows):
        tokens = list(row.tokens)
        np.testing.assert_allclose(found[i].log_probs, picked(tokens)[-row.n_scored :], atol=1e-5)
        assert (
            found[i].greedy.tolist()
            == (numpy_log_probs(tokens).argmax(-1) == tokens[1:])[-row.n_scored :].tolist()
        )


def test_few_logits_at_once_give_the_same_scores(model: GPT, monkeypatch: pytest.MonkeyPatch):
    row = Row(TOKENIZER.encode(TEXT[:33]), 32)
    # 4 positions, a power of two.
    monkeypatch.setattr("lama.evaluation.likelihood.LOGITS", 7 * TOKENIZER.vocab_size)
    scorer = Scorer(model, 1, 32)
    assert scorer.chunk == 4
    np.testing.assert_allclose(scorer([row])[0][0], picked(list(row.tokens)), atol=1e-5)


def test_few_widths_are_compiled():
    assert by_width([40, 3, 31], 64) == [(64, [0, 2, 1])]  # two short rows are not worth a compilation
    assert by_width([40, *[3] * 1000], 64) == [(64, [0]), (32, list(range(1, 1001)))]
    assert by_width([37, 36], 37) == [(37, [0, 1])]  # never wider than the context
    lengths = np.random.default_rng(0).integers(1, 1024, 5000).tolist()
    groups = by_width(lengths, 1024)
    assert len(groups) <= 32 and sorted(i for _, indices in groups for i in indices) == list(range(5000))
    assert all(lengths[i] <= width for width, indices in groups for i in indices)


def test_log_likelihoods_that_are_not_numbers_are_refused():
    broken = GPT(GPTConfig(TOKENIZER.vocab_size, CONTEXT, d_model=18, n_layers=1, n_heads=3))
    get_state_dict(broken)["ln_final.weight"].assign(Tensor.full((18,), math.nan)).realize()
    with pytest.raises(LamaError, match=r"log-likelihoods are not finite: nan to nan. Try --dtype float32"):
        perplexity(broken, TOKENIZER, "abc")


# --- perplexity


def test_windows_are_the_documented_ones():
    assert strided_windows(8, 4, 2) == [(0, 4, 3), (2, 6, 2), (4, 8, 2)]
    assert strided_windows(9, 4, 2) == [(0, 4, 3), (2, 6, 2), (4, 8, 2), (6, 9, 1)]
    assert strided_windows(4, 8, 3) == [(0, 4, 3)]  # one window holds it all
    assert strided_windows(9, 4, 4) == [(0, 4, 3), (4, 8, 3)]  # no overlap: tokens 4 and 8 have no context


def test_windows_score_every_token_but_the_first_once():
    for n in range(2, 41):
        for context in range(2, 14):
            for stride in range(1, context):
                scored = [
                    t for begin, end, k in strided_windows(n, context, stride) for t in range(end - k, end)
                ]
                assert scored == list(range(1, n))
                assert all(
                    begin < end - k and end - begin <= context
                    for begin, end, k in strided_windows(n, context, stride)
                )


@pytest.mark.parametrize(("stride", "context"), [(18, 37), (5, 37), (36, 37), (37, 37), (3, 11)])
def test_perplexity_equals_the_numpy_computation(model: GPT, stride: int, context: int):
    tokens = TOKENIZER.encode(TEXT)
    nats = []
    seen = 0
    # a window at a time, new tokens only, without a batch or a cache.
    for begin in range(0, len(tokens), stride):
        window = tokens[begin : begin + context]
        if begin + len(window) > max(seen, begin + 1):
            nats += [-p for t, p in enumerate(picked(window), begin + 1) if t >= max(seen, 1)]
        seen = begin + len(window)
        if seen == len(tokens):
            break
    result = perplexity(model, TOKENIZER, TEXT, stride, context)
    # 101 tokens, 3 windows without an overlap.
    assert result.tokens == len(nats) == (100 if stride < context else 98)
    assert result.nats_per_token == pytest.approx(np.mean(nats), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)


def test_default_windows_are_the_whole_context_moving_by_half(model: GPT):
    result = perplexity(model, TOKENIZER, TEXT)
    assert (result.context_length, result.stride, result.tokens) == (37, 18, 100)
    assert result == perplexity(model, TOKENIZER, TEXT, 18, 37)


def test_units_equal_the_hand_computed_ones():
    result = TextScore(context_length=4, stride=2, tokens=3, n_bytes=12, nats=6 * math.log(2))
    assert result.nats_per_token == pytest.approx(2 * math.log(2))
    assert (result.perplexity, result.bits_per_token, result.bits_per_byte) == (
        pytest.approx(4),
        pytest.approx(2),
        pytest.approx(0.5),
    )
    assert TextScore(4, 2, 1, 1, 1e4).perplexity == math.inf


def test_bytes_are_those_of_the_scored_tokens(model: GPT):
    # The first é is context only, the last has two bytes.
    assert perplexity(model, TOKENIZER, "éab é").n_bytes == 5


@pytest.mark.parametrize(
    ("stride", "context", "message"),
    [
        (0, None, "stride must be at least 1 and at most context_length=37; got 0"),
        (38, None, "stride must be at least 1 and at most context_length=37; got 38"),
        (None, 38, "context_length must be at least 2 and at most the model's 37; got 38"),
        (None, 1, "context_length must be at least 2 and at most the model's 37; got 1"),
    ],
)
def test_windows_that_cannot_be_are_refused(
    model: GPT, stride: int | None, context: int | None, message: str
):
    with pytest.raises(UsageError, match=re.escape(message)):
        perplexity(model, TOKENIZER, TEXT, stride, context)


def test_text_of_one_token_is_refused(model: GPT):
    with pytest.raises(LamaError, match="perplexity needs at least two tokens; got 1"):
        perplexity(model, TOKENIZER, "a")


# --- HellaSwag and LAMBADA

ROOF = {
    "ind": 5,
    "activity_label": "Mending a roof",
    "ctx_a": "A woman climbs up [substeps] a ladder.",
    "ctx_b": "she",
    "ctx": "A woman climbs up [substeps] a ladder. she",
    "label": 1,
    "endings": ["sings.", "lays  tiles. [step] Rests.", "sleeps on it [title] Ends.", "eats."],
}
PASSAGE = {"text": "he called her name\n\nand nobody answered"}


def write(path: Path, *examples: Any) -> Path:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return path


def test_hellaswag_is_worded_as_in_the_harness(tmp_path: Path):
    path = write(tmp_path / "val.jsonl", ROOF, ROOF | {"ctx_b": "", "label": "3"})
    first, second = read_examples(TASKS["hellaswag"], path)
    context = "Mending a roof: A woman climbs up a ladder."
    assert first == BenchmarkItem(
        f"{context} She",
        ("sings.", "lays tiles. Rests.", "sleeps on it. Ends.", "eats."),
        1,
        f"line 1 of {path}",
    )
    assert (second.context, second.label, second.where) == (context, 3, f"line 2 of {path}")


def test_markup_is_taken_out_as_in_the_harness():
    assert without_markup(" Wash it [title] Dry it. [step] Use a towel. ") == "Wash it. Dry it. Use a towel."
    # Its blanks are looked at once, before and after.
    assert without_markup("[header] How to [a] dry") == " How to dry"


def test_hellaswag_is_judged_by_sum_and_by_characters():
    examples = [
        BenchmarkItem("", ("ab", "abcd"), 0, ""),
        BenchmarkItem("", ("ab", "abcd"), 1, ""),
        BenchmarkItem("", ("", "ab"), 1, ""),
    ]
    # Sums prefer the first ending of each; per character -1 and -0.75 prefer the second, and an empty ending
    # never wins.
    answers = [[Answer(-2, False), Answer(-3, False)]] * 2 + [[Answer(-1, False), Answer(-2, False)]]
    assert hellaswag_metrics(examples, answers) == {
        "acc": pytest.approx(1 / 3),
        "acc_norm": pytest.approx(2 / 3),
    }


def test_lambada_is_the_last_word_after_the_rest(tmp_path: Path):
    path = write(tmp_path / "test.jsonl", PASSAGE)
    assert read_examples(TASKS["lambada"], path) == [
        BenchmarkItem("he called her name\n\nand nobody", ("answered",), 0, f"line 1 of {path}")
    ]


def test_lambada_is_judged_by_all_tokens_and_by_whole_words():
    examples = [BenchmarkItem("", ("a",), 0, "")] * 4
    answers = [
        [Answer(math.log(p), greedy)]
        for p, greedy in ((0.5, True), (0.5, False), (0.125, False), (0.5, False))
    ]
    assert lambada_metrics(examples, answers) == {"acc": 0.25, "perplexity": pytest.approx(2**1.5)}


def test_ending_is_spelled_with_the_space_before_it():
    gpt2 = gpt2_tokenizer()
    for context in ("Once upon", "Once upon \n"):
        start, ending = encode_pair(gpt2, BenchmarkItem(context, (), 0, ""), "a time")
        assert start == gpt2.encode("Once upon") and start + ending == gpt2.encode(context + " a time")
    assert (
        gpt2.decode(encode_pair(gpt2, BenchmarkItem("Once upon \n", (), 0, ""), "a time")[1]) == " \n a time"
    )


def by_hand(context: str, ending: str, context_length: int = CONTEXT) -> Answer:
    """One ending alone, in numpy."""
    tokens = TOKENIZER.encode(f"{context} {ending}")[-(context_length + 1) :]
    n = len(ending) + 1
    return Answer(
        float(picked(tokens)[-n:].sum()), bool((numpy_log_probs(tokens).argmax(-1) == tokens[1:])[-n:].all())
    )


def test_task_equals_the_numpy_computation(model: GPT):
    letters = np.random.default_rng(2)
    word = lambda n: "".join(letters.choice(list(ALPHABET[1:]), n))  # noqa: E731
    examples = [
        BenchmarkItem(word(5 + i % 7), tuple(word(3 + k % 5) for k in range(4)), i % 4, f"line {i}")
        for i in range(12)
    ]
    examples += [
        BenchmarkItem(word(33), (word(2), word(9)), 1, "line 12"),
        BenchmarkItem(word(28), (word(9), word(3)), 0, "line 13"),
    ]
    answers = [[by_hand(example.context, ending) for ending in example.endings] for example in examples]
    result = evaluate(TASKS["hellaswag"], model, TOKENIZER, examples)
    # 33 + 10 tokens are more than 38; 28 + 10 are just what fits, as the last is not fed.
    assert result == TaskScore(14, 1, hellaswag_metrics(examples, answers))
    assert 0 < result.metrics["acc"] < 1

    words = [BenchmarkItem(example.context, example.endings[:1], 0, example.where) for example in examples]
    found = evaluate(TASKS["lambada"], model, TOKENIZER, words, context_length=12).metrics
    expected = lambada_metrics(
        words, [[by_hand(example.context, example.endings[0], 12)] for example in words]
    )
    assert found == {"acc": expected["acc"], "perplexity": pytest.approx(expected["perplexity"], rel=1e-5)}


def test_greedy_needs_every_token_of_the_word(model: GPT):
    context = "ab"
    continued = context
    for _ in range(3):
        continued += TOKENIZER.characters[
            int(numpy_log_probs([*TOKENIZER.encode(continued), 0])[-1].argmax())
        ]
    row = Row(TOKENIZER.encode(continued), 3)
    (right,) = score(model, [row])
    (wrong,) = score(model, [Row([*row.tokens[:-1], (row.tokens[-1] + 1) % TOKENIZER.vocab_size], 3)])
    assert right.greedy.tolist() == [True, True, True] and wrong.greedy.tolist() == [True, True, False]


def test_ending_that_does_not_fit_is_refused(model: GPT):
    example = BenchmarkItem("a", ("b", "c" * 37), 0, "line 7 of x")
    with pytest.raises(
        LamaError, match="an ending must fit context_length; got 38 tokens on line 7 of x, context_length=37"
    ):
        evaluate(TASKS["hellaswag"], model, TOKENIZER, [example])


def test_text_that_the_model_cannot_spell_is_refused_with_its_line(model: GPT):
    with pytest.raises(
        LamaError,
        match=r"line 7 of x: text must be made of the model's 29 characters .*; got 'A' at character 0",
    ):
        evaluate(TASKS["lambada"], model, TOKENIZER, [BenchmarkItem("A", ("b",), 0, "line 7 of x")])


def test_standard_error_is_the_one_of_a_share():
    assert TaskScore(101, 0, {"acc": 0.2}).standard_error("acc") == pytest.approx(0.04)
    assert TaskScore(1, 0, {"acc": 1.0}).standard_error("acc") is None


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in ROOF.items() if name != key}


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("hellaswag", b"{", "line 2 of {path} must be valid JSON; got Expecting property name"),
        ("hellaswag", b"[1]", "line 2 of {path} must be an object; got [1]"),
        (
            "hellaswag",
            b"\xff",
            "line 2 of {path} must be valid JSON; got byte 0xff at offset 0, which is not UTF-8",
        ),
        ("hellaswag", b"[" * 100_000, "line 2 of {path} must be valid JSON; got over 100 levels"),
        ("hellaswag", without("ctx_a"), "line 2 of {path} must have ctx_a; got ind, activity_label, ctx_b, "),
        ("hellaswag", without("endings"), "line 2 of {path} must have endings; got "),
        (
            "hellaswag",
            without("label"),
            "an example must have a label; got none on line 2 of {path}. The test split has none",
        ),
        ("hellaswag", ROOF | {"label": ""}, "an example must have a label; got none on line 2"),
        (
            "hellaswag",
            ROOF | {"label": 4},
            "label must be the index of the right ending, 0 to 3; got label=4 on line 2 of {path}",
        ),
        (
            "hellaswag",
            ROOF | {"label": -1},
            "label must be the index of the right ending, 0 to 3; got label=-1 on line 2",
        ),
        (
            "hellaswag",
            ROOF | {"label": True},
            "label must be the index of the right ending, 0 to 3; got label=True on line 2",
        ),
        (
            "hellaswag",
            ROOF | {"label": "²"},
            "label must be the index of the right ending, 0 to 3; got label='²' on line 2",
        ),
        (
            "hellaswag",
            ROOF | {"label": "9" * 5000},
            "label must be the index of the right ending, 0 to 3; got label='999",
        ),
        ("hellaswag", ROOF | {"ctx_b": None}, "ctx_b in line 2 of {path} must be a text; got None"),
        ("hellaswag", ROOF | {"endings": "abcd"}, "endings in line 2 of {path} must be a list; got 'abcd'"),
        (
            "hellaswag",
            ROOF | {"endings": ["a"]},
            "endings must be a list of two texts or more; got ['a'] on line 2 of {path}",
        ),
        ("lambada", {"passage": "a b"}, "line 2 of {path} must have text; got passage"),
        ("lambada", {}, "line 2 of {path} must have text; got nothing"),
        (
            "lambada",
            {"text": "word"},
            "a passage must be words with spaces between them; got 'word' on line 2 of {path}",
        ),
        (
            "lambada",
            {"text": "a word "},
            "a passage must be words with spaces between them; got 'a word ' on line 2 of {path}",
        ),
    ],
)
def test_line_that_cannot_be_used_is_named(tmp_path: Path, task: str, line: Any, message: str):
    path = write(tmp_path / "data.jsonl", ROOF if task == "hellaswag" else PASSAGE)
    with open(path, "ab") as file:
        file.write(line if isinstance(line, bytes) else json.dumps(line).encode())
    with pytest.raises(LamaError) as error:
        read_examples(TASKS[task], path)
    assert str(error.value).startswith(message.format(path=path)) and f"line 2 of {path}" in str(error.value)
    assert len(read_examples(TASKS[task], path, limit=1)) == 1  # what is not asked for is not read


def test_data_that_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "empty").write_text("\n  \n")
    for path, message in (
        (tmp_path / "none", "{path} cannot be read: No such file or directory"),
        (tmp_path, "{path} cannot be read: Is a directory"),
        (tmp_path / "empty", "data must hold at least one example; got an empty file, {path}"),
    ):
        with pytest.raises(LamaError, match=re.escape(message.format(path=path))):
            read_examples(TASKS["lambada"], path)
    with pytest.raises(UsageError, match="limit must be at least 1; got 0"):
        read_examples(TASKS["lambada"], tmp_path / "empty", limit=0)


def test_published_figures_name_protocol_and_source():
    assert PUBLISHED.keys() == TASKS.keys()
    for name, series in PUBLISHED.items():
        assert [s.same for s in series].count(True) == 1
        for s in series:
            assert s.protocol and s.source and set(s.figures) <= {"acc", "acc_norm", "perplexity"}
            assert all(len(values) == len(SIZES) and any(values) for values in s.figures.values()), name


# --- transformers


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install lama[peers]")
    return pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install lama[peers]"
    )


@pytest.mark.peers
@pytest.mark.parametrize("stride", [18, 7, 36, 37])
def test_perplexity_equals_transformers(model: GPT, folder: Path, transformers: Any, stride: int):
    """The loop of the documentation, where each window weighs as many tokens as it scores, and as it stands:
    there a window after the first weighs one less."""
    import torch

    peer = transformers.GPT2LMHeadModel.from_pretrained(folder).eval().float()
    tokens = torch.tensor([TOKENIZER.encode(TEXT * 7)])
    nats, n, done = 0.0, 0, 0
    as_it_stands, weights = 0.0, 0
    for begin in range(0, tokens.shape[1], stride):
        end = min(begin + CONTEXT, tokens.shape[1])
        window = tokens[:, begin:end]
        labels = window.clone()
        labels[:, : done - begin] = -100
        scored = int((labels[:, 1:] != -100).sum())
        if scored:
            with torch.no_grad():
                loss = peer(window, labels=labels).loss.item()
            weight = int((labels != -100).sum()) - 1
            nats, as_it_stands, weights = nats + scored * loss, as_it_stands + weight * loss, weights + weight
        n, done = n + scored, end
        if end == tokens.shape[1]:
            break
    result = perplexity(model, TOKENIZER, TEXT * 7, stride)
    assert result.tokens == n
    assert result.perplexity == pytest.approx(math.exp(nats / n), abs=1e-3)
    assert result.perplexity == pytest.approx(math.exp(as_it_stands / weights), rel=1e-3)


@pytest.mark.peers
def test_likelihood_of_endings_equals_transformers(tmp_path: Path, transformers: Any):
    """GPT-2's own tokens, and all of HellaSwag's and LAMBADA's way from a file to numbers."""
    import torch

    config = random_gpt2.make_config(n_positions=24, n_embd=12, n_layer=1, n_head=2)
    random_gpt2.write_folder(tmp_path / "gpt2", config, random_gpt2.make_weights(config, seed=5, std=0.3))
    ours = load_model(tmp_path / "gpt2")
    peer = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2").eval().double()
    gpt2 = gpt2_tokenizer()

    def answer(context: str, ending: str) -> Answer:
        start, whole = gpt2.encode(context.rstrip()), gpt2.encode(f"{context} {ending}")
        n = len(whole) - len(start)
        tokens = torch.tensor([whole[-25:]])
        with torch.no_grad():
            log_probs = peer(tokens[:, :-1]).logits[0].log_softmax(-1)[-n:]
        targets = tokens[0, -n:]
        return Answer(
            float(log_probs.gather(1, targets[:, None]).sum()), bool((log_probs.argmax(-1) == targets).all())
        )

    roofs = [ROOF | {"ctx_a": f"{ROOF['ctx_a']} {'Up she goes. ' * i}", "label": i % 4} for i in range(6)]
    examples = read_examples(TASKS["hellaswag"], write(tmp_path / "val.jsonl", *roofs))
    answers = [[answer(example.context, ending) for ending in example.endings] for example in examples]
    result = evaluate(TASKS["hellaswag"], ours, gpt2, examples)
    assert result.metrics == hellaswag_metrics(examples, answers) and result.cut > 0

    passages = [{"text": PASSAGE["text"][: 12 + 3 * i] + " surprisingly"} for i in range(6)]
    examples = read_examples(TASKS["lambada"], write(tmp_path / "test.jsonl", *passages))
    expected = lambada_metrics(
        examples, [[answer(example.context, example.endings[0])] for example in examples]
    )
    found = evaluate(TASKS["lambada"], ours, gpt2, examples).metrics
    assert found["acc"] == expected["acc"] and found["perplexity"] == pytest.approx(
        expected["perplexity"], rel=1e-4
    )
