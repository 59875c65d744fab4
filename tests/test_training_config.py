"""The settings of a training run: where they come from, which are refused, how they are saved."""

import dataclasses
import math
from typing import Any

import pytest

from lama.errors import LamaError, UsageError, did_you_mean
from lama.models.gpt import GPTConfig
from lama.training.settings import RunConfig, presets, read_settings, run_config
from lama.training.settings.base import ABOUT_REPORTS, TrainingConfig, differences, fields_of, to_toml
from lama.training.settings.gpt import MODEL_SETTINGS
from lama.training.settings.scale import CHOSEN, REFERENCE, Scale, parse_size, scaled

SETTINGS = fields_of(RunConfig)
OTHER = {
    "model": "gpt",
    "corpus": ("a b.txt", 'quo"te\\', "ü\t\x7f\x01.txt"),
    "validation": 0.07,
    "evaluate_every": 0,
    "batch_size": 20,
}


def other(field: "dataclasses.Field[object]") -> object:
    """A value of the setting that is not its default."""
    if field.name in OTHER:
        return OTHER[field.name]
    match field.default:
        case bool():
            return not field.default
        case int():
            return field.default * 2 + 2
        case float():
            return field.default / 3 + 1e-7
        case tuple():
            return ("other",)
    return field.metadata["choices"][-1] if field.metadata["choices"] else "other"


def parameters(settings: dict[str, int], vocab_size: int, context_length: int) -> int:
    return (
        12 * settings["n_layers"] * settings["d_model"] ** 2
        + (vocab_size + context_length) * settings["d_model"]
    )


# --- files


def test_saved_settings_are_read_back_to_the_last_bit(tmp_path):
    others = {name: other(field) for name, field in SETTINGS.items()} | {"optimizer": "adamw"}  # for lora
    for config in (RunConfig(), run_config(others)):
        path = tmp_path / "settings.toml"
        path.write_text(to_toml(config, "lama train --corpus 'a\nb'\x07"), encoding="utf-8")
        assert run_config(read_settings(str(path))) == config
        assert path.read_text("utf-8").startswith("# lama train --corpus 'a?b'?\n\nsteps = ")


def test_saved_settings_say_what_each_is_for():
    lines = to_toml(RunConfig()).splitlines()
    assert [line.split(" = ")[0] for line in lines] == list(SETTINGS)
    assert all(
        line.endswith(f"  # {field.metadata['about']}")
        for line, field in zip(lines, SETTINGS.values(), strict=True)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "lerning_rate = 1.0",
            r"must hold only settings of lama train; got 'lerning_rate'\. Did you mean learning_rate\?",
        ),
        (
            "[model]\nn_layers = 2",
            r"model must be one of gpt, bert, seq2seq, classifier; got {'n_layers': 2} in ",
        ),
        ("steps = ", "must be valid TOML; got: Invalid value"),
        ("steps = 1\nsteps = 2", "must be valid TOML; got: Cannot overwrite a value"),
        (b"corpus = ['caf\xe9']", r"run\.toml must be readable UTF-8 text; got byte 0xe9 at offset 14"),
        (None, r"run\.toml cannot be read: No such file"),
    ],
)
def test_file_that_holds_no_settings_is_refused(tmp_path, content, message):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LamaError, match=message):
        read_settings(str(path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": "many"}, "steps must be of type int; got 'many'"),
        ({"steps": True}, "steps must be of type int; got True"),
        ({"steps": 1.5}, "steps must be of type int; got 1.5"),
        ({"corpus": "a.txt"}, "corpus must be of type list; got 'a.txt'"),
        ({"corpus": [1]}, r"corpus must be of type list; got \[1\]"),
        ({"corpus": ["\udce9"]}, "corpus must be valid Unicode"),
        ({"validation": 0}, "validation must be above 0; got 0.0"),
        ({"validation": 1}, "validation must be below 1; got 1.0"),
        ({"norm": "post-norm"}, r"norm must be one of pre, post; got 'post-norm'\. Did you mean post\?"),
        (
            {"activation": "swish"},
            "activation must be one of gelu_new, gelu, relu, silu, tanh, quick_gelu, relu2; got 'swish'$",
        ),
        ({"keep": 0}, "keep must be at least 1; got 0"),
    ],
)
def test_value_that_does_not_fit_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        run_config(settings)


# --- presets


def test_presets_are_those_of_the_readme():
    assert presets() == [
        "gpt2",
        "llama-char-cpu",
        "modern-bpe",
        "modern-char",
        "modern-char-cpu",
        "shakespeare-bpe",
        "shakespeare-char",
        "shakespeare-char-cpu",
    ]


@pytest.mark.parametrize("name", presets())
def test_preset_is_a_whole_run_that_fits_together(name):
    config = run_config(read_settings(name))
    GPTConfig(50257, **{setting: getattr(config, setting) for setting in MODEL_SETTINGS})
    assert config.warmup < config.steps and config.min_learning_rate < config.learning_rate


def test_preset_that_is_none_names_the_nearest_and_where_a_text_goes(tmp_path):
    with pytest.raises(UsageError, match=r"got 'shakespear-char'\. Did you mean shakespeare-char\?"):
        read_settings("shakespear-char")
    text = tmp_path / "book.txt"
    text.touch()
    with pytest.raises(UsageError, match=r"book.txt'\. Give a text to train on with --corpus$"):
        read_settings(str(text))


def test_did_you_mean_says_nothing_where_nothing_is_near():
    assert (did_you_mean("stepps", SETTINGS), did_you_mean("xyzzy", SETTINGS)) == (
        ". Did you mean steps?",
        "",
    )


# --- differences


def test_differences_name_every_setting_that_decides_the_weights():
    old = dataclasses.asdict(RunConfig())
    for name, field in SETTINGS.items():
        if name == "model":
            continue
        found = differences(old, old | {name: other(field)})
        assert found == (
            [] if name in ABOUT_REPORTS else [f"{name} was {old[name]!r} and is {other(field)!r}"]
        )
    assert set(SETTINGS) - {field.name for field in dataclasses.fields(TrainingConfig)} >= ABOUT_REPORTS


# --- sizes


def chosen(scale: Scale, vocab_size: int = 65, **given: object) -> dict[str, Any]:
    return scaled(scale, run_config({"context_length": 256, **given}), given, vocab_size)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", ["300K", "1M", "10M", "124M", "1.5B"])
def test_size_gives_a_model_of_about_so_many_parameters(size, gated):
    found = chosen(Scale(size), gated=gated)
    assert sorted(found) == sorted(CHOSEN)
    assert parameters(found, 65, 256) == pytest.approx(parse_size(size), rel=0.2)
    mlp = found["d_mlp"] * found["d_model"] * (3 if gated else 2)
    assert mlp == pytest.approx(8 * found["d_model"] ** 2, rel=0.1)
    assert found["d_model"] // found["n_heads"] in (32, 64)
    run_config(found)


def test_larger_models_learn_more_slowly_from_larger_batches():
    small, medium, large = (chosen(Scale(size), 50257) for size in ("10M", "124M", "1.5B"))
    assert small["learning_rate"] > medium["learning_rate"] > large["learning_rate"] > 0
    assert small["batch_size"] < medium["batch_size"] < large["batch_size"]
    assert (medium["n_layers"], medium["d_model"], medium["n_heads"]) == (12, 768, 12)  # GPT-2's


def test_depth_of_the_reference_gives_its_numbers():
    found = chosen(Scale(depth=12), 32_768, optimizer="muon", context_length=2048)
    tokens = found["steps"] * found["batch_size"] * 2048
    assert tokens == pytest.approx(12 * REFERENCE, rel=1e-3)
    assert found["batch_size"] * 2048 == 2**19 and found["d_model"] == 768
    assert (found["learning_rate"], found["weight_decay"]) == (2e-3, 0.1)


def test_rate_decay_and_steps_follow_the_batch_and_the_ratio():
    ours, longer = (chosen(Scale(depth=4, ratio=ratio), optimizer="muon") for ratio in (12, 48))
    assert longer["batch_size"] == 2 * ours["batch_size"]  # 4^0.383 is 1.7
    assert longer["steps"] == pytest.approx(2 * ours["steps"], abs=1)
    assert ours["learning_rate"] == pytest.approx(2**0.5 * longer["learning_rate"], rel=0.05)
    for found in (ours, longer):  # as at the reference
        forgets = found["learning_rate"] * found["weight_decay"] * found["steps"]
        assert forgets == pytest.approx(2e-3 * 0.1 * 12 * REFERENCE / 2**19, rel=0.1)


def test_short_runs_have_smaller_batches_and_no_larger_rates():
    short, shorter = (chosen(Scale(depth=1, ratio=ratio), optimizer="muon") for ratio in (12, 0.1))
    assert 180 <= short["steps"] < 360 and shorter["batch_size"] == 4 and shorter["steps"] < 180
    assert short["learning_rate"] < shorter["learning_rate"] < 8e-3


def test_large_embeddings_have_a_larger_rate():
    found = chosen(Scale(depth=4), optimizer="muon", initial_weights="width", tied=False)
    assert found["embedding_learning_rate"] == pytest.approx(10 * found["learning_rate"], rel=0.05)
    assert chosen(Scale(depth=4), optimizer="muon")["embedding_learning_rate"] == 0


def test_given_settings_stay_and_the_others_follow():
    found = chosen(Scale(depth=4), batch_size=8, optimizer="muon")
    assert (found["batch_size"], found["accumulation"]) == (8, 1)
    assert found["steps"] * 8 * 256 == pytest.approx(12 * (12 * 4 * 256**2 + 65 * 256), rel=1e-3)
    reference = 12 * REFERENCE / 2**19
    assert found["learning_rate"] == pytest.approx(2e-3 * (reference / found["steps"]) ** 0.5, rel=0.05)
    assert chosen(Scale(depth=4), steps=7)["steps"] == 7


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({}, "one of --size and --depth must be given"),
        ({"size": "1M", "depth": 2}, "one of --size and --depth must be given"),
        ({"depth": 0}, "depth must be from 1 to 96; got 0"),
        ({"depth": 97}, "depth must be from 1 to 96; got 97"),
        ({"depth": 2, "ratio": 0.0}, "ratio must be above 0 and at most 1,000,000; got 0.0"),
        ({"depth": 2, "ratio": math.nan}, "ratio must be above 0 and at most 1,000,000; got nan"),
    ],
)
def test_scale_that_is_none_is_refused(scale, message):
    with pytest.raises(UsageError, match=message):
        Scale(**scale)


def test_size_that_the_vocabulary_fills_is_refused():
    with pytest.raises(
        UsageError, match=r"size must leave room for the embeddings; got 100,000 parameters for 50,257 tokens"
    ):
        chosen(Scale("100K"), 50257)


@pytest.mark.parametrize(
    ("text", "value"), [("800K", 8e5), ("10m", 1e7), ("1.5B", 1.5e9), ("124000000", 1.24e8)]
)
def test_size_is_read_with_its_unit(text, value):
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "M", "big", "-3M", "nan", "inf", "10MB", "12", "1000B"])
def test_size_that_is_none_is_refused(text):
    with pytest.raises(
        UsageError, match=r"size must be a number of parameters such as 800K, 10M or 1.5B; got "
    ):
        parse_size(text)


def test_lists_and_whole_numbers_of_a_file_take_the_settings_types():
    assert run_config({"corpus": ["a", "b"], "learning_rate": 1}) == RunConfig(
        corpus=("a", "b"), learning_rate=1.0
    )


@pytest.mark.parametrize("context", [100, 300, 1000])
def test_parts_of_a_chosen_batch_divide_it(context):
    given = run_config({"context_length": context})
    config = run_config(scaled(Scale("10M"), given, {}, 256))
    assert config.batch_size % config.accumulation == 0


def test_given_width_shapes_the_rest():
    given = run_config({"d_model": 256})
    chosen = scaled(Scale(depth=6), given, {"d_model": 256}, 256)
    assert (chosen["d_model"], chosen["n_heads"], chosen["d_mlp"]) == (256, 8, 1024)
