"""Muon: step by step against numpy, tinygrad's and PyTorch's; its groups; that training resumes exactly."""

from typing import Any

import numpy as np
import pytest
from helpers import RUN, fill, normal
from test_kernels import both, ran  # noqa: F401  (fixtures)
from test_runs import cats, start, until  # noqa: F401  (fixtures)
from tinygrad import Context, Tensor
from tinygrad.nn.state import get_state_dict

from lama.errors import UsageError
from lama.models.bert import Bert, BertConfig
from lama.models.encoder_decoder import Transformer, TransformerConfig
from lama.models.gpt import GPT, GPTConfig
from lama.ops import orthogonalise
from lama.training.folder import RunFolder
from lama.training.loop import Trainer
from lama.training.optimizers import AdamW, Muon, joined_rows
from lama.training.prepare import new_session, resumed_run
from lama.training.settings.base import TrainingConfig

# Queries have another shape than keys and values, and `out` has that of the queries.
SHAPE = GPTConfig(
    11, 13, d_model=12, n_layers=2, n_heads=2, n_kv_heads=1, d_mlp=20, bias=False, positions="rope"
)
CONFIG = TrainingConfig(
    optimizer="muon", learning_rate=1e-3, matrix_learning_rate=0.02, weight_decay=0.1, momentum=0.9
)
Arrays = dict[str, np.ndarray]


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """Jordan's, in numpy."""
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T).T
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def parts_of(name: str, matrix: np.ndarray) -> list[np.ndarray]:
    return np.split(matrix, [12, 18]) if name.endswith("qkv.weight") else [matrix]


class Twin:
    """Muon of some matrices, queries, keys and values apart, in numpy's float64."""

    def __init__(self, weights: Arrays, config: TrainingConfig):
        self.parts = {name: parts_of(name, w.astype(float)) for name, w in weights.items()}
        self.momenta = {name: [np.zeros_like(p) for p in parts] for name, parts in self.parts.items()}
        self.config = config

    def step(self, gradients: Arrays, rate: float) -> None:
        beta, decay = self.config.momentum, self.config.weight_decay
        for name, parts in self.parts.items():
            for p, m, g in zip(parts, self.momenta[name], parts_of(name, gradients[name]), strict=True):
                m *= beta
                m += (1 - beta) * g
                u = newton_schulz((1 - beta) * g + beta * m) * max(1, p.shape[0] / p.shape[1]) ** 0.5
                p -= rate * (u + decay * p)

    def weights(self) -> Arrays:
        return {name: np.concatenate(parts) for name, parts in self.parts.items()}


def gradients_of(parameters: dict[str, Tensor], step: int) -> Arrays:
    return {name: normal(*p.shape, seed=100 * step + i) for i, (name, p) in enumerate(parameters.items())}


def steps(model: Any, config: TrainingConfig, rates: tuple[float, ...], scale: float = 0.5) -> Muon:
    """Muon's steps on random gradients."""
    parameters = get_state_dict(model)
    muon = Muon(parameters, config, joined_rows(model))
    for t, rate in enumerate(rates, 1):
        gradients = {name: Tensor(g).realize() for name, g in gradients_of(parameters, t).items()}
        Tensor.realize(*muon.update(gradients, muon.scalars(t, rate), Tensor([scale]).realize()))
    return muon


def test_singular_values_move_to_about_one(both):  # noqa: F811
    for shape in ((3, 7, 5), (2, 5, 9), (1, 6, 6)):
        x = normal(*shape)
        found = orthogonalise(Tensor(x / np.linalg.norm(x, axis=(1, 2), keepdims=True))).numpy()
        np.testing.assert_allclose(found, [newton_schulz(each) for each in x], atol=1e-5)
        values = np.linalg.svd(found, compute_uv=False)
        assert values.min() > 0.6 and values.max() < 1.3


def test_muon_equals_numpy_step_by_step_and_adamw_updates_the_rest(both):  # noqa: F811
    model, rates = GPT(SHAPE), (1e-3, 5e-4, 2e-3)
    before = fill(model)
    muon = steps(model, CONFIG, rates)
    assert {name.split(".", 2)[-1] for name in muon.matrices} == {
        *("attn.qkv.weight", "attn.out.weight", "mlp.up.weight", "mlp.down.weight")
    }
    twin = Twin({name: before[name] for name in muon.matrices}, CONFIG)
    for t, rate in enumerate(rates, 1):
        gradients = gradients_of(get_state_dict(model), t)
        twin.step({name: g / 2 for name, g in gradients.items()}, 20 * rate)
    for name, expected in twin.weights().items():
        np.testing.assert_allclose(muon.matrices[name].numpy(), expected, atol=1e-4, err_msg=name)

    other = GPT(SHAPE)
    fill(other)
    rest = {name: p for name, p in get_state_dict(other).items() if name not in muon.matrices}
    adamw = AdamW(rest, CONFIG)
    for t, rate in enumerate(rates, 1):
        gradients = gradients_of(get_state_dict(other), t)
        found = {name: Tensor(gradients[name]).realize() for name in rest}
        Tensor.realize(*adamw.update(found, adamw.scalars(t, rate), Tensor([0.5]).realize()))
    for name, p in rest.items():
        np.testing.assert_array_equal(p.numpy(), get_state_dict(model)[name].numpy(), err_msg=name)


def test_muon_equals_tinygrads():
    from tinygrad.nn.optim import Muon as Theirs

    model, rates = GPT(SHAPE), (0.02, 0.01)
    before = fill(model)
    config = TrainingConfig(optimizer="muon", learning_rate=1.0, matrix_learning_rate=1.0)
    muon = steps(model, config, rates, scale=1.0)
    parts = [
        (name, i, Tensor(part).is_param_())
        for name in muon.matrices
        for i, part in enumerate(parts_of(name, before[name]))
    ]
    for name, i, part in parts:
        scale = max(1, part.shape[0] / part.shape[1]) ** 0.5  # theirs has no factor for the shape
        optimizer = Theirs([part], lr=1.0, momentum=config.momentum, weight_decay=config.weight_decay / scale)
        for t, rate in enumerate(rates, 1):
            optimizer.lr.assign(Tensor([rate * scale])).realize()
            gradient = gradients_of(get_state_dict(model), t)[name]
            part.grad = Tensor(np.ascontiguousarray(parts_of(name, gradient)[i]))
            with Context(TRAINING=1):
                optimizer.step()
    for name, matrix in muon.matrices.items():
        theirs = np.concatenate([part.numpy() for each, _, part in parts if each == name])
        np.testing.assert_allclose(matrix.numpy(), theirs, atol=1e-4, err_msg=name)


@pytest.mark.peers
def test_muon_equals_pytorchs(monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install lama[peers]")
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())  # it would round by 0.4 %
    model, rates = GPT(SHAPE), (0.02, 0.01)
    before = fill(model)
    config = TrainingConfig(optimizer="muon", learning_rate=1.0, matrix_learning_rate=1.0)
    muon = steps(model, config, rates, scale=1.0)
    for name, matrix in muon.matrices.items():
        theirs = [torch.nn.Parameter(torch.from_numpy(part.copy())) for part in parts_of(name, before[name])]
        optimizer = torch.optim.Muon(theirs, lr=1.0, weight_decay=0.1, momentum=0.95)
        for t, rate in enumerate(rates, 1):
            optimizer.param_groups[0]["lr"] = rate
            gradient = gradients_of(get_state_dict(model), t)[name]
            for p, g in zip(theirs, parts_of(name, gradient), strict=True):
                p.grad = torch.from_numpy(np.ascontiguousarray(g))
            optimizer.step()
        expected = np.concatenate([p.detach().numpy() for p in theirs])
        np.testing.assert_allclose(matrix.numpy(), expected, atol=1e-4, err_msg=name)


def test_groups_have_their_own_rates():
    model = GPT(GPTConfig(11, 13, 12, 1, 3, tied=False))
    before = fill(model)
    changes = {"embedding": 4.0, "head": 2.0, "matrix": 3.0}
    rates = {f"{group}_learning_rate": factor * 1e-3 for group, factor in changes.items()}
    config = TrainingConfig(learning_rate=1e-3, weight_decay=0.0, **rates)
    optimizer = AdamW(get_state_dict(model), config)
    ones = {name: Tensor.ones(*p.shape).contiguous() for name, p in optimizer.parameters.items()}
    Tensor.realize(*ones.values())
    Tensor.realize(*optimizer.update(ones, optimizer.scalars(1, 1e-3), Tensor([1.0]).realize()))
    for name, p in optimizer.parameters.items():
        group = "head" if "unembed" in name else "embedding" if "embed" in name else "matrix"
        factor = changes[group] if p.ndim == 2 or group == "head" else 1.0
        np.testing.assert_allclose(before[name] - p.numpy(), factor * 1e-3, rtol=1e-3, err_msg=name)


def test_other_models_have_matrices_for_muon_too():
    bert = Bert(BertConfig(11, 13, d_model=12, n_layers=1, n_heads=2, mask=1))
    sizes = {"d_model": 12, "n_encoder_layers": 1, "n_decoder_layers": 1, "n_heads": 2}
    pairs = Transformer(TransformerConfig(11, **sizes))
    # q, k, v and out of each attention have one shape; up and down have others.
    for model, matrices, square in ((bert, 4, 4), (pairs, 10, 12)):
        muon = Muon(get_state_dict(model), CONFIG, joined_rows(model))
        assert (len(muon.matrices), muon.momenta[12, 12].shape[0]) == (matrices, square)


def test_model_without_blocks_is_refused():
    model = GPT(GPTConfig(11, 13, 12, n_layers=0, n_heads=1))
    with pytest.raises(UsageError, match=r"muon needs matrices in blocks; got a model without\. Use adamw"):
        Trainer(model, lambda step: (), CONFIG)


# --- whole runs


@pytest.mark.parametrize("changes", [{}, {"precision": "bfloat16", "accumulation": 1, "schedule": "wsd"}])
def test_resumed_run_has_the_same_bits(start, changes):  # noqa: F811
    settings = {"optimizer": "muon", "steps": 6, **changes}
    whole, half = start("whole", **settings), start("half", **settings)
    list(whole)
    until(half, 3)
    resumed = resumed_run(half.folder, {})
    list(resumed)
    assert whole.best < whole.untrained
    for name, p in whole.trainer.parameters.items():
        np.testing.assert_array_equal(resumed.trainer.parameters[name].numpy(), p.numpy(), err_msg=name)
    state = resumed.trainer.optimizer.state()
    for name, t in whole.trainer.optimizer.state().items():
        np.testing.assert_array_equal(state[name].numpy(), t.numpy(), err_msg=name)


def test_two_devices_learn_as_one_does(start, cats, tmp_path):  # noqa: F811
    one = start("one", optimizer="muon", steps=3)
    list(one)
    settings = {"corpus": [str(cats)], "evaluate_every": 3, "warmup": 2, **RUN, "accumulation": 1}
    settings |= {"optimizer": "muon", "steps": 3}
    two = new_session(RunFolder(tmp_path / "two"), settings, "lama train ...", devices=("CPU", "CPU:1"))
    two.measure_start()
    list(two)
    for name, p in one.trainer.parameters.items():
        np.testing.assert_allclose(two.trainer.parameters[name].numpy(), p.numpy(), atol=1e-4, err_msg=name)
