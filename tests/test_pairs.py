"""Pairs: the tasks, their splits, their tokenizers, the arrays that a model learns from, and that it does
learn.
"""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor

from lama.checkpoints import load_tokenizer, save
from lama.data.pairs import (
    encode_pairs,
    pair_arrays,
    pair_baselines,
    pair_batches,
    read_pairs,
    split_pairs,
    unigram_loss,
)
from lama.data.tasks import TASKS, in_digits, in_words
from lama.errors import LamaError, UsageError
from lama.interp.attention import draw_pattern
from lama.interp.cross_attention import cross_patterns, focus
from lama.models.encoder_decoder import Transformer, TransformerConfig
from lama.ops import cross_entropy
from lama.tokenizers import CharacterTokenizer, PairTokenizer, WordTokenizer, tokenizer_from_json
from lama.training.folder import RunFolder
from lama.training.loop import Step
from lama.training.loss import Evaluator, pair_loss
from lama.training.pairs import PairSession, pair_model
from lama.training.rows import Rows
from lama.training.schedule import learning_rate
from lama.training.session import Parts
from lama.training.settings.base import TrainingConfig
from lama.training.settings.pairs import PRESETS, PairSettings

PAIRS = [("abc", "cba"), ("ab", "ba"), ("a", "a"), ("abcd", "dcba"), ("bd", "db")]
TOKENIZER = PairTokenizer(CharacterTokenizer("abcd"))


# --- tasks


@pytest.mark.parametrize("name", TASKS)
def test_task_has_distinct_sources_and_disjoint_parts(name):
    task = TASKS[name]
    pairs = task.make()
    assert pairs == task.make() and len({source for source, _ in pairs}) == len(pairs)
    train, held_out = split_pairs(pairs, task.held_out, task.key)
    assert sorted(train + held_out) == sorted(pairs)
    assert abs(len(held_out) / len(pairs) - task.held_out) < 0.05
    assert not {task.key(pair) for pair in train} & {task.key(pair) for pair in held_out}


def test_tasks_are_those_that_have_settings():
    assert TASKS.keys() == PRESETS.keys()
    for settings in PRESETS.values():
        PairSettings(**settings)


def test_tasks_are_right():
    """Each task's rule, written once more."""
    rules = {
        "copy": lambda text: text,
        "reverse": lambda text: "".join(reversed(text)),
        "sort": lambda text: "".join(c * text.count(c) for c in "012"),
    }
    for name, rule in rules.items():
        assert all(target == rule(source) for source, target in TASKS[name].make())
    assert len(TASKS["sort"].make()) == 3**6
    for source, target in TASKS["dates"].make():
        year, month, day = source.split("-")
        found = re.fullmatch(r"(\d\d)/(...)/(\d\d)(\d\d)", target)
        assert (
            found and (found[1], found[4]) == (day, year) and found[3] == ("19" if int(year) >= 74 else "20")
        )
        assert (
            found[2]
            == ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"][
                int(month) - 1
            ]
        )


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (305, "three hundred and five"),
        (1000, "one thousand"),
        (2019, "two thousand and nineteen"),
        (7241, "seven thousand two hundred and forty-one"),
    ],
)
def test_numbers_in_words(n, words):
    assert in_words(n) == words
    assert in_digits((words, str(n))) == in_digits((str(n), words)) == str(n)


def test_fields_of_dates_and_reversals():
    pair = ("98-03-21", "21/Mar/1998")
    parts = [(pair[1][t.start : t.stop], pair[0][s.start : s.stop]) for t, s in TASKS["dates"].fields(pair)]
    assert parts == [("21", "21"), ("Mar", "03"), ("1998", "98")]
    pair = ("abcd", "dcba")
    assert all(pair[1][t.start] == pair[0][s.start] for t, s in TASKS["reverse"].fields(pair))


# --- files


def test_file_of_pairs_is_read(tmp_path: Path):
    (tmp_path / "a.tsv").write_text("one\tein\n\ntwo\tzwei ä\n", encoding="utf-8")
    assert read_pairs(tmp_path / "a.tsv") == [("one", "ein"), ("two", "zwei ä")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"one ein\n", "each line must be a source, one tab and a target; got 'one ein' in line 1"),
        (b"a\tb\none\t\n", "got 'one.t' in line 2"),
        (b"a\tb\tc\n", "got 'a.tb.tc' in line 1"),
        (b"\n", "must have at least one; got none"),
        (b"a\t\xff\n", "must be readable UTF-8"),
    ],
)
def test_file_of_pairs_is_refused(tmp_path: Path, text: bytes, message: str):
    (tmp_path / "a.tsv").write_bytes(text)
    with pytest.raises(LamaError, match=message):
        read_pairs(tmp_path / "a.tsv")


# --- tokenizers


def test_words_are_tokens_and_others_are_spelled():
    tokenizer = WordTokenizer.of(["two hundred", "two hundred 42", "Ümlaut, so-so: 42"])
    assert [tokenizer.entries[i] for i in tokenizer.encode("two hundred tow 42")] == [
        "two",
        " hundred",
        " ",
        "t",
        "o",
        "w",
        " ",
        "4",
        "2",
    ]
    for text in ("two hundred", "42 Ümlaut, so-so", "", "  two"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(
        LamaError, match="text must be made of characters that the model has seen; got 'f' in 'fox'"
    ):
        tokenizer.encode("fox")
    with pytest.raises(LamaError, match="token ids must be in the tokenizer's vocabulary"):
        tokenizer.decode([tokenizer.vocab_size])


def test_pair_tokenizer_makes_room_for_three():
    assert TOKENIZER.vocab_size == 7 and TOKENIZER.encode("ad") == [3, 6]
    assert TOKENIZER.decode([1, 3, 6, 0, 2, 3]) == "ad"


@pytest.mark.parametrize("inner", [CharacterTokenizer("abc"), WordTokenizer.of(["ab cd", "ab"])])
def test_pair_tokenizer_comes_back(tmp_path: Path, inner):
    tokenizer = PairTokenizer(inner)
    save(
        tmp_path,
        Transformer(TransformerConfig(tokenizer.vocab_size, d_model=4, n_heads=1, n_encoder_layers=1)),
        tokenizer,
    )
    assert load_tokenizer(tmp_path).encode("ab") == tokenizer.encode("ab")


def test_word_tokenizer_that_is_broken_is_refused(tmp_path: Path):
    for entries in (["a", ""], [3], "ab"):
        with pytest.raises(LamaError, match="a tokenizer's kind must be one of"):
            tokenizer_from_json({"kind": "words", "entries": entries}, tmp_path)
    with pytest.raises(LamaError, match="entries must be at least one, each once"):
        tokenizer_from_json({"kind": "words", "entries": ["a", "a"]}, tmp_path)


# --- arrays and loss


def test_arrays_of_pairs():
    data = encode_pairs(PAIRS[:2], TOKENIZER)
    sources, inputs, wanted, weights = pair_arrays(data, [0, 1], data.lengths, n_rows=3)
    assert sources.tolist() == [[3, 4, 5, 2], [3, 4, 2, 0], [0] * 4]
    assert inputs.tolist() == [[1, 5, 4, 3], [1, 4, 3, 0], [0] * 4]
    assert wanted.tolist() == [[5, 4, 3, 2], [4, 3, 2, 0], [0] * 4]
    assert (weights[:2] > 0).tolist() == [[True] * 4, [True, True, True, False]]
    assert weights[2].tolist() == [0] * 4 and weights.mean() == pytest.approx(1)


def test_padding_and_empty_rows_count_nothing():
    model = Transformer(TransformerConfig(7, 16, 6, 1, 1, 3))
    data = encode_pairs(PAIRS, TOKENIZER)
    narrow = [pair_arrays(data, [i], (len(data.sources[i]), len(data.targets[i]) + 1)) for i in range(5)]
    sums = [pair_loss(model, *map(Tensor, arrays)).item() * arrays[2].size for arrays in narrow]
    mean = sum(sums) / sum(arrays[2].size for arrays in narrow)
    wide = pair_arrays(data, range(5), (9, 8), n_rows=6)
    assert pair_loss(model, *map(Tensor, wide)).item() == pytest.approx(mean, rel=1e-5)
    assert Evaluator(model, wide, 3, pair_loss)() == pytest.approx(mean, rel=1e-5)


def test_batches_go_through_all_pairs_in_each_epoch():
    data = encode_pairs(PAIRS, TOKENIZER)
    batches = pair_batches(data, 2, seed=3)
    rows = [tuple(row) for step in range(5) for row in batches(step)[0]]  # two epochs
    assert len(set(rows[:5])) == len(set(rows[5:])) == 5 and rows[:5] != rows[5:]
    np.testing.assert_array_equal(batches(3)[1], pair_batches(data, 2, seed=3)(3)[1])


def test_baselines_by_hand():
    learned = [("a", "x"), ("b", "x"), ("c", "y")]
    assert pair_baselines(learned, [("d", "d"), ("e", "x"), ("f", "z"), ("g", "g")]) == {
        "copying": 0.5,
        "commonest target": 0.25,
    }
    assert pair_baselines(learned, [("d", "d")]) == {"commonest target": 0.0}  # copying is the task itself
    tokenizer = PairTokenizer(CharacterTokenizer("xyabc"))
    data = encode_pairs(learned, tokenizer)
    counts = np.full(tokenizer.vocab_size, 0.1)
    counts[[tokenizer.end, *tokenizer.encode("xy")]] += 3, 2, 1
    p = counts / counts.sum()
    expected = (
        -(
            3 * math.log(p[2])
            + 2 * math.log(p[tokenizer.encode("x")[0]])
            + math.log(p[tokenizer.encode("y")[0]])
        )
        / 6
    )
    assert unigram_loss(data, data, tokenizer.vocab_size) == pytest.approx(expected)


def test_label_smoothings_floor_is_the_entropy_of_the_smoothed_target():
    for v, epsilon, floor in ((11, 0.1, 0.5140), (37_000, 0.1, 1.3769)):
        q = np.full(v, epsilon / v)
        q[4] += 1 - epsilon
        logits = Tensor(np.log(q)[None].astype(np.float32))
        loss = cross_entropy(logits, Tensor([4]), epsilon).mean()
        assert (
            loss.item() == pytest.approx(floor, abs=1e-3) == pytest.approx(-(q * np.log(q)).sum(), abs=1e-3)
        )
        assert np.abs(loss.gradient(logits)[0].numpy()).max() < 1e-5  # and it cannot be lowered
    surer = q.copy()
    surer[4] = 1 - 1e-9 * v
    assert (
        cross_entropy(
            Tensor(np.log(np.full(v, 1e-9) + (np.arange(v) == 4) * surer)[None].astype(np.float32)),
            Tensor([4]),
            0.1,
        ).item()
        > 1.5
    )


def test_noam_schedule_has_the_papers_values():
    """d_model 512, warm-up 4,000; the peak's height is a setting."""
    peak = 512**-0.5 * 4000**-0.5
    config = TrainingConfig(schedule="noam", warmup=4000, learning_rate=peak, steps=100_000)
    for step, rate in ((1, 1.7469e-7), (4000, 6.9877e-4), (100_000, 1.3975e-4)):
        assert learning_rate(step - 1, config) == pytest.approx(rate, rel=1e-4)
        assert rate == pytest.approx(512**-0.5 * min(step**-0.5, step * 4000**-1.5), rel=1e-4)


# --- learning


SETTINGS = {
    "steps": 150,
    "batch_size": 5,
    "learning_rate": 5e-3,
    "warmup": 10,
    "d_model": 24,
    "n_layers": 1,
    "n_heads": 2,
}


def session(folder: Path, **changes) -> PairSession:
    settings, data = PairSettings(**{**SETTINGS, **changes}), encode_pairs(PAIRS, TOKENIZER)
    model = pair_model(settings, TOKENIZER, data.lengths)
    parts = Parts(RunFolder(folder), settings, model=model, tokenizer=TOKENIZER)
    return PairSession(parts, Rows(PAIRS, PAIRS, ""))


def losses(training: PairSession) -> list[float]:
    return [event.loss for event in training if isinstance(event, Step)]


def weights(training: PairSession) -> dict[str, np.ndarray]:
    return {name: p.numpy().copy() for name, p in training.trainer.parameters.items()}


def test_pairs_are_learned_by_heart_and_every_parameter_moves(tmp_path):
    training = session(tmp_path)
    before = weights(training)
    found = losses(training)
    assert found[0] > 1 and found[-1] < 0.02 and training.evaluator() < 0.02
    for name, array in weights(training).items():
        assert (array != before[name]).any(), name


def test_paper_recipe_runs(tmp_path):
    """Warm-up and decay, dropout and label smoothing, in parts, pre-norm."""
    changes = {"schedule": "noam", "dropout": 0.1, "label_smoothing": 0.1, "norm": "pre", "average": 3}
    found = losses(session(tmp_path, steps=12, batch_size=4, accumulation=2, warmup=4, **changes))
    assert found[-1] < found[0]


def test_average_is_the_mean_of_the_last(tmp_path):
    training = session(tmp_path, steps=20, average=2, evaluate_every=20)
    found = {e.step: weights(training) for e in training if isinstance(e, Step) and e.step in (19, 20)}
    assert training.averaged == {19, 20}
    assert not np.array_equal(found[19]["embed.weight"], found[20]["embed.weight"])
    for name, mean in weights(training).items():
        np.testing.assert_array_equal(mean, np.mean([found[19][name], found[20][name]], axis=0))


def test_trainer_stops_after_the_step_under_way(tmp_path):
    training = session(tmp_path)
    steps = []
    for step in training:
        steps.append(step.step)
        training.stop()
    assert steps == [1]


def test_recompute_is_refused():
    with pytest.raises(UsageError, match="recompute must be off for --model seq2seq; got recompute=True"):
        PairSettings(recompute=True)


# --- where it looks


def test_focus_by_hand():
    patterns = np.zeros((1, 2, 1, 3, 4))
    patterns[0, 0, 0] = [[1, 0, 0, 0], [0.25] * 4, [0, 0, 0.5, 0.5]]
    patterns[0, 1, 0] = [[0.5, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    fields = [[(range(0, 1), range(0, 1)), (range(1, 3), range(2, 4))], [(range(0, 1), range(0, 2))]]
    assert focus(patterns, fields).tolist() == [[pytest.approx((1 + 0.5 + 1 + 1) / 4)]]


def test_patterns_belong_to_what_is_predicted():
    model = Transformer(TransformerConfig(7, 16, 6, 1, 2, 3))
    data = encode_pairs(PAIRS, TOKENIZER)
    patterns = cross_patterns(model, data)
    assert patterns.shape == (2, 5, 3, 5, 5)
    np.testing.assert_allclose(patterns.sum(-1), 1, atol=1e-5)
    assert patterns[:, 2, :, :, 2:].max() == 0  # "a" and its end, then padding


def test_drawn_pattern():
    assert draw_pattern(np.array([[1.0, 0.0], [0.5, 0.55]]), ["b", "a"], ["x", "y"]) == "   x y\nb  @\na  + +"
