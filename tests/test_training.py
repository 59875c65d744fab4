"""Training: the loss, the schedule, the optimizer, and that a model learns."""

import math

import numpy as np
import pytest
from helpers import fill, normal
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama.data import batch, default_corpus, encode_corpus
from lama.errors import LamaError, UsageError
from lama.generation import generate
from lama.models.gpt import GPT, GPTConfig
from lama.ops import square_parts
from lama.tokenizers import CharacterTokenizer, train_bpe
from lama.training.loop import Trainer, clipping, language_model_batches
from lama.training.loss import Evaluator, cross_entropy
from lama.training.optimizers import AdamW
from lama.training.prepare import model_config
from lama.training.schedule import learning_rate
from lama.training.settings import read_settings, run_config
from lama.training.settings.base import TrainingConfig

TEXT = "to be or not to be: "
TOKENIZER = CharacterTokenizer(TEXT)
VOCAB, CONTEXT = TOKENIZER.vocab_size, len(TEXT) - 1
DATA = np.array(TOKENIZER.encode(TEXT))  # one window and the token after it
# All of these tests train this shape: a training step is some hundred kernels to compile.
SHAPE = GPTConfig(VOCAB, CONTEXT, d_model=22, n_layers=1, n_heads=2, d_mlp=37)
CONFIG = TrainingConfig(steps=3, batch_size=5, learning_rate=1e-2, min_learning_rate=1e-3, warmup=2)


def train(model: GPT, data: np.ndarray, config: TrainingConfig) -> Trainer:
    return Trainer(model, language_model_batches(data, config, CONTEXT), config)


def parameters(model: GPT) -> dict[str, np.ndarray]:
    return {name: p.numpy().copy() for name, p in get_state_dict(model).items()}


# --- the loss


def loss_of(logits: np.ndarray, targets: list[list[int]]) -> float:
    return float(cross_entropy(Tensor(logits.astype(np.float32)), Tensor(np.array(targets, np.int32))).item())


def test_cross_entropy_equals_the_hand_computed_one():
    logits = np.log([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]])
    assert loss_of(logits, [[0, 1]]) == pytest.approx(-(math.log(0.5) + math.log(0.2)) / 2)


def test_cross_entropy_of_flat_logits_is_that_of_the_uniform_distribution():
    assert loss_of(np.full((2, 3, 7), 1.7), [[0, 1, 2], [6, 5, 4]]) == pytest.approx(math.log(7), abs=1e-6)


def test_cross_entropy_of_sure_and_right_logits_is_zero():
    targets = [[3, 1, 4]]
    assert loss_of(50 * np.eye(7)[targets], targets) == pytest.approx(0, abs=1e-6)


def test_cross_entropy_is_safe_with_huge_logits():
    targets = [[3, 1, 4]]
    sure = 1e30 * np.eye(7)[targets]
    assert loss_of(sure, targets) == 0
    assert loss_of(1e4 * np.eye(7)[targets], [[0, 0, 0]]) == pytest.approx(1e4)  # sure and wrong


def test_cross_entropy_gradient_is_softmax_minus_one_hot():
    x, targets = normal(2, 3, 7), np.array([[0, 1, 2], [6, 5, 4]], np.int32)
    logits = Tensor(x)
    gradient = cross_entropy(logits, Tensor(targets)).gradient(logits)[0].numpy()
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    np.testing.assert_allclose(gradient, (p - np.eye(7)[targets]) / 6, atol=1e-7)


def test_label_smoothing_mixes_the_target_with_the_uniform_distribution():
    logits = np.log([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]]).astype(np.float32)
    nll, flat = -(math.log(0.5) + math.log(0.2)) / 2, -np.log([0.5, 0.25, 0.25, 0.1, 0.2, 0.7]).mean()
    smooth = cross_entropy(Tensor(logits), Tensor([[0, 1]]), 0.1).item()
    assert smooth == pytest.approx(0.9 * nll + 0.1 * flat, rel=1e-6)


def test_evaluate_is_the_mean_over_all_rows():
    model = GPT(SHAPE)
    fill(model)
    windows = np.random.default_rng(0).integers(0, VOCAB, (2, 7, CONTEXT)).astype(np.int32)
    logits = model(Tensor(windows[0])).numpy().astype(float)
    expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, windows[1][..., None], -1)[..., 0]
    # The seventh window is a batch of its own.
    evaluator = Evaluator(model, (windows[0], windows[1]), batch_size=3)
    assert [evaluator() for _ in range(3)] == [pytest.approx(expected.mean(), rel=1e-5)] * 3
    fill(model, seed=1)
    assert abs(evaluator() - expected.mean()) > 1e-3  # captured, and yet it sees the new weights
    fill(model)
    assert Evaluator(model, (windows[0][:3], windows[1][:3]), batch_size=100)() == pytest.approx(
        expected[:3].mean(), rel=1e-5
    )


# --- the schedule


def rates(steps: int, warmup: int, peak: float, floor: float, schedule: str = "cosine") -> list[float]:
    config = TrainingConfig(
        steps=steps, warmup=warmup, learning_rate=peak, min_learning_rate=floor, schedule=schedule
    )
    return [learning_rate(step, config) for step in range(steps)]


def test_cosine_rises_linearly_and_falls_along_half_a_cosine():
    assert rates(9, 4, 8.0, 2.0) == pytest.approx(
        [2, 4, 6, 8, 8, 5 + 3 * math.sqrt(0.5), 5, 5 - 3 * math.sqrt(0.5), 2]
    )


def test_cosine_without_warmup_starts_at_the_peak():
    assert rates(3, 0, 8.0, 2.0) == pytest.approx([8, 5, 2])


def test_cosine_of_a_run_that_is_all_warmup_stays_within_the_peak():
    assert rates(3, 3, 6.0, 0.6) == pytest.approx([2, 4, 6])
    assert rates(1, 0, 6.0, 0.6) == [6]


def test_constant_schedule_stays_at_the_peak():
    assert rates(5, 2, 6.0, 0.6, "constant") == pytest.approx([3, 6, 6, 6, 6])


def test_noam_schedule_falls_with_the_root_of_the_step():
    got = rates(16, 4, 8.0, 0.8, "noam")
    assert got[:4] == pytest.approx([2, 4, 6, 8])
    assert got[15] == pytest.approx(4)  # a quarter as often as at step 4, so half the rate
    # Vaswani et al. 2017, eq. 3, with the peak that it has for d_model and warm-up
    d_model, warmup = 512, 4
    paper = [d_model**-0.5 * min(n**-0.5, n * warmup**-1.5) for n in range(1, 17)]
    assert rates(16, 4, max(paper), 1e-9, "noam") == pytest.approx(paper)


def test_wsd_schedule_is_constant_and_then_falls_in_a_line():
    config = TrainingConfig(
        10, warmup=2, learning_rate=1.0, min_learning_rate=0.2, schedule="wsd", warmdown=0.4
    )
    expected = [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert [learning_rate(step, config) for step in range(10)] == pytest.approx(expected)


# --- the optimizer


def test_decay_is_on_matrices_only():
    model = GPT(SHAPE)
    before = fill(model)
    optimizer = AdamW(get_state_dict(model), TrainingConfig(weight_decay=0.1))
    zeros = {name: Tensor.zeros(*p.shape) for name, p in optimizer.parameters.items()}
    Tensor.realize(*optimizer.update(zeros, optimizer.scalars(1, 0.5), Tensor.ones(1)))
    for name, p in optimizer.parameters.items():
        kept = 1.0 if "ln" in name or name.endswith("bias") else 1 - 0.5 * 0.1
        np.testing.assert_allclose(p.numpy(), before[name] * kept, rtol=1e-6, err_msg=name)


def test_clipping_gives_the_norm_and_the_factor_to_the_limit():
    gradients = [Tensor([[3.0, 0.0]]), Tensor([0.0, 0.0, -4.0])]
    for limit, factor in ((1.0, 0.2), (7.0, 1.0), (0.0, 1.0)):
        norm, scale = clipping(square_parts(gradients), limit)
        assert (norm.tolist(), scale.tolist()) == ([5.0], [pytest.approx(factor, rel=1e-6)])


def test_optimizer_step_equals_the_textbook_formula():
    config, rate = TrainingConfig(weight_decay=0.3, beta1=0.8, beta2=0.95), 0.1
    model = GPT(SHAPE)
    named = {name: get_state_dict(model)[name] for name in ("blocks.0.attn.out.weight", "ln_final.bias")}
    expected = {name: value.astype(float) for name, value in fill(model).items() if name in named}
    m, v = ({name: np.zeros_like(value) for name, value in expected.items()} for _ in range(2))
    optimizer = AdamW(named, config)
    for t in (1, 2, 3):
        gradients = {name: normal(*p.shape, seed=t) for name, p in named.items()}
        Tensor.realize(
            *optimizer.update(
                {n: Tensor(g) for n, g in gradients.items()}, optimizer.scalars(t, rate), Tensor([0.5])
            )
        )
        for name, p in named.items():
            g = gradients[name] / 2
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g.astype(float) ** 2
            step = (m[name] / (1 - 0.8**t)) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8)
            expected[name] -= rate * (step + (0.3 if p.ndim == 2 else 0) * expected[name])
    for name, p in named.items():
        np.testing.assert_allclose(p.numpy(), expected[name], atol=1e-5, err_msg=name)
        np.testing.assert_allclose(optimizer.state()[f"m.{name}"].numpy(), m[name], atol=1e-6, err_msg=name)
        np.testing.assert_allclose(optimizer.state()[f"v.{name}"].numpy(), v[name], atol=1e-6, err_msg=name)


# --- the loop


def test_loss_starts_near_that_of_guessing_and_every_parameter_moves():
    model = GPT(SHAPE)
    before = parameters(model)
    step = next(iter(train(model, DATA, CONFIG)))
    assert step.loss == pytest.approx(math.log(VOCAB), rel=0.03)
    for name, after in parameters(model).items():
        assert np.isfinite(after).all(), name
        assert (after != before[name]).any(), name
        # AdamW's first step is at most its rate, whatever the gradient; then comes the decay.
        assert np.abs(after - before[name]).max() <= step.learning_rate * (
            1.001 + 0.1 * np.abs(before[name]).max()
        ), name


@pytest.mark.parametrize("preset", ["shakespeare-char-cpu", "shakespeare-bpe"])
def test_first_batch_of_a_preset_has_the_loss_of_guessing(preset):
    text = default_corpus().text[:20_000]
    config = run_config(read_settings(preset))
    tokenizer = (
        CharacterTokenizer("".join(sorted(set(text))))
        if config.tokenizer == "character"
        else train_bpe(text, 1024)
    )
    inputs, targets = batch(
        encode_corpus(tokenizer, text), 0, config.seed, config.batch_size, config.context_length
    )
    model = GPT(model_config(config, tokenizer.vocab_size), config.seed)
    loss, guess = cross_entropy(model(Tensor(inputs)), Tensor(targets)).item(), math.log(tokenizer.vocab_size)
    assert abs(loss - guess) < min(0.05, 0.03 * guess)


def test_one_batch_of_a_preset_is_memorised():
    text = default_corpus().text[:20_000]
    config = run_config(read_settings("shakespeare-char-cpu") | {"steps": 250, "min_learning_rate": 3e-4})
    tokenizer = CharacterTokenizer("".join(sorted(set(text))))
    rows = batch(encode_corpus(tokenizer, text), 0, config.seed, config.batch_size, config.context_length)
    losses = [
        step.loss
        for step in Trainer(
            GPT(model_config(config, tokenizer.vocab_size), config.seed), lambda _: rows, config
        )
    ]
    assert losses[0] == pytest.approx(math.log(tokenizer.vocab_size), rel=0.03)
    assert losses[-1] < 0.05


def test_steps_report_what_they_did():
    data = np.random.default_rng(0).integers(0, VOCAB, 211)
    steps = list(train(GPT(SHAPE), data, CONFIG))
    assert [s.step for s in steps] == [1, 2, 3]
    assert [s.learning_rate for s in steps] == pytest.approx([0.005, 0.01, 0.01])
    assert all(s.loss > 0 and s.gradient_norm > 0 and s.tokens_per_second > 0 for s in steps)
    assert steps[-1].seconds_left == 0 < steps[0].seconds_left


def test_same_seed_gives_the_same_losses():
    data = np.random.default_rng(0).integers(0, VOCAB, 211)

    def losses(weights: int, batches: int) -> list[float]:
        config = TrainingConfig(steps=4, batch_size=5, learning_rate=1e-2, warmup=2, seed=batches)
        return [step.loss for step in train(GPT(SHAPE, weights), data, config)]

    first = losses(0, 0)
    assert losses(0, 0) == first
    assert losses(0, 1) != first


def losses_and_weights(**options: object) -> tuple[list[float], dict[str, np.ndarray]]:
    """Of four steps on six windows a batch."""
    devices = options.pop("devices", ())
    config = TrainingConfig(
        **{"steps": 4, "batch_size": 6, "learning_rate": 1e-2, "warmup": 2, "dropout": 0.3, **options}
    )
    model, data = GPT(SHAPE), np.random.default_rng(0).integers(0, VOCAB, 211)
    trainer = Trainer(model, language_model_batches(data, config, CONTEXT), config, devices=devices)
    return [step.loss for step in trainer], parameters(model)


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], dict[str, np.ndarray]]:
    return losses_and_weights()


@pytest.mark.parametrize(
    "options",
    [
        {"accumulation": 3},
        {"recompute": True},
        {"recompute": True, "accumulation": 2},
        {"devices": ("CPU", "CPU:1")},
        {"devices": ("CPU", "CPU:1"), "accumulation": 3},
    ],
    ids=str,
)
def test_work_in_parts_gives_what_the_whole_batch_gives(options, plain):
    """With dropout on: which entries are dropped depends on the row of the batch, not on the part it comes
    in.
    """
    losses, weights = losses_and_weights(**options)
    np.testing.assert_allclose(losses, plain[0], atol=1e-5)
    for name, value in weights.items():
        # Where a gradient is nothing but rounding, AdamW makes a step of it: a whole rate a step, at most.
        np.testing.assert_allclose(value, plain[1][name], atol=2e-3, err_msg=name)
        assert np.abs(value - plain[1][name]).mean() < 1e-5, name


def test_dropout_changes_the_losses_and_depends_on_the_seed(plain):
    assert abs(losses_and_weights(dropout=0.0)[0][0] - plain[0][0]) > 1e-4
    assert losses_and_weights()[0] == plain[0]


def test_matmul_precision_bfloat16_change_little_and_something(plain):
    losses, _ = losses_and_weights(precision="bfloat16")
    np.testing.assert_allclose(losses, plain[0], atol=1e-2)
    assert losses != plain[0]


def test_batch_that_devices_cannot_share_is_refused():
    config = TrainingConfig(steps=1, batch_size=6, accumulation=2)
    with pytest.raises(
        UsageError,
        match="batch_size must be a multiple of devices x accumulation; got batch_size=6, 2 devices, "
        "accumulation=2",
    ):
        Trainer(GPT(SHAPE), language_model_batches(DATA, config, CONTEXT), config, devices=("CPU", "CPU:1"))


def test_one_window_is_memorised():
    model = GPT(SHAPE)
    config = TrainingConfig(steps=150, batch_size=5, learning_rate=1e-2, min_learning_rate=1e-3, warmup=10)
    losses = [step.loss for step in train(model, DATA, config)]
    assert losses[-1] < 0.01
    assert str(generate(model, TOKENIZER, TEXT[:1], max_new_tokens=CONTEXT, temperature=0)) == TEXT[1:]


def test_loss_that_is_no_number_stops_the_training():
    config = TrainingConfig(steps=9, batch_size=5, learning_rate=1e30, warmup=0)
    with pytest.raises(
        LamaError,
        match=r"training diverged at step [23]: loss=.*, gradient norm=.*\. Lower the "
        r"learning rate",
    ):
        list(train(GPT(SHAPE), DATA, config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"batch_size": -3}, "batch_size must be at least 1; got -3"),
        (
            {"batch_size": 6, "accumulation": 4},
            "batch_size must be a multiple of accumulation; got batch_size=6, accumulation=4",
        ),
        ({"dropout": 1.0}, "dropout must be below 1; got 1.0"),
        (
            {"schedule": "cosin"},
            r"schedule must be one of cosine, constant, noam, wsd; got 'cosin'\. Did you mean cosine\?",
        ),
        ({"learning_rate": 0.0}, "learning_rate must be above 0; got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number; got nan"),
        ({"seed": -1}, "seed must be at least 0; got -1"),
    ],
)
def test_training_config_refuses_what_is_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        TrainingConfig(**options)


def test_corpus_shorter_than_a_window_is_named():
    with pytest.raises(
        LamaError, match=f"longer than context_length; got 7 tokens .*context_length={CONTEXT}"
    ):
        next(iter(train(GPT(SHAPE), DATA[:7], CONFIG)))
