"""The threads that kernels run on: the same results whatever their number, from any Python thread, after a
fork, at the end.
"""

import functools
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from helpers import normal
from test_kernels import needs_c, results
from tinygrad import Tensor, TinyJit, UOp, dtypes

from lama.errors import UsageError
from lama.ops import (
    add,
    attention,
    cross_entropy,
    dropout,
    embedding,
    gelu,
    layernorm,
    matmul,
    softmax,
    square_parts,
)
from lama.runtime import threads as pool
from lama.runtime.capture import CapturedStep, InputBuffer

pytestmark = needs_c
KEY = np.array([7, 0], np.uint32)
ROWS = np.random.default_rng(0).integers(0, 65, 1543)
# Large enough for several slices, none of them equal: each kernel, and its gradient for each input.
USES = {
    "matmul": (lambda a, b: matmul(a, b), (1543, 197), (197, 263)),
    "matmul of batches": (lambda a, b: matmul(a, b, transpose_b=True), (29, 131, 67), (29, 113, 67)),
    "matmul of a few rows": (lambda a, b: matmul(a, b, transpose_b=True), (2, 523), (4099, 523)),
    "matmul with a bias": (lambda a, b, c: matmul(a, b, bias=c), (1543, 197), (197, 263), (263,)),
    "softmax": (softmax, (1543, 197)),
    "layernorm": (lambda x, w, b: layernorm(x, w, b, 1e-5), (1543, 197), (197,), (197,)),
    "cross-entropy": (lambda x: cross_entropy(x, Tensor(ROWS)), (1543, 197)),
    "squares": (lambda x: square_parts([x]), (1543, 197)),
    "gelu": (gelu, (1543, 197)),
    "dropout": (lambda x: dropout(x, 0.2, Tensor(KEY), 3), (1543, 197)),
    "embedding": (lambda w: embedding(w, Tensor(ROWS, dtype=dtypes.int32)), (65, 257)),
    "attention": (
        lambda q, k, v: attention(q, k, v, 0.2, 0, None, 0.2, Tensor(KEY), 3),
        *[(2, 3, 197, 24)] * 3,
    ),
    "attention of one head": (lambda q, k, v: attention(q, k, v, 0.2), *[(1, 1, 523, 24)] * 3),
    "MLP": (
        lambda x, w, b, v: matmul(gelu(matmul(x, w, bias=b)), v),
        (523, 67),
        (67, 263),
        (263,),
        (263, 71),
    ),
    "norm of a sum": (
        lambda x, h, w: layernorm(add(x, dropout(h, 0.2, Tensor(KEY), 3)), w, None, 1e-5),
        *[(1543, 197)] * 2,
        (197,),
    ),
}


pool_of = functools.cache(pool.ThreadPool)  # its threads stay


def run_on(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    made = pool_of(threads)
    monkeypatch.setattr(pool, "pool", lambda: made)
    monkeypatch.setenv("LAMA_THREADS", str(threads))  # products are cut into more parts for more threads


@pytest.mark.parametrize("use", USES)
def test_results_are_the_same_bit_for_bit_whatever_the_number_of_threads(monkeypatch, use):
    function, *shapes = USES[use]
    arrays = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    found = []
    for threads in (1, 3) if use == "MLP" else (1, 3, 7):  # products are compiled for each
        run_on(monkeypatch, threads)
        inputs = [Tensor(a) for a in arrays]
        y = function(*inputs)
        found.append([y.numpy()] if use == "squares" else results(y, normal(*y.shape), *inputs))
    for other in found[1:]:
        assert all((one == two).all() for one, two in zip(found[0], other, strict=True))


def product() -> tuple[Tensor, Tensor, np.ndarray]:
    a, b = normal(1543, 197), normal(197, 263)
    return Tensor(a).realize(), Tensor(b).realize(), a.astype(float) @ b


def test_kernels_may_be_run_from_several_python_threads_at_once(monkeypatch):
    run_on(monkeypatch, 2)
    a, b, expected = product()
    first = matmul(a, b).numpy()  # compiled here
    calls = [TinyJit(lambda: matmul(a, b).realize()) for _ in range(3)]
    for call in calls:
        for _ in range(2):
            call()
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(30):
            if (calls[number]().numpy() != first).any():
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong and np.abs(first - expected).max() < 1e-3


def test_waiting_threads_go_to_sleep(monkeypatch):
    run_on(monkeypatch, 3)
    a, b, _ = product()
    matmul(a, b).realize()
    spent = []
    while not spent or (spent[-1] > 0.01 and len(spent) < 20):  # numpy's own threads spin for some time, too
        before = time.process_time()
        time.sleep(0.1)
        spent.append(time.process_time() - before)
    assert spent[-1] < 0.01
    assert np.isfinite(matmul(a, b).numpy()).all()  # and wake up


SCRIPT = """
import os, sys
import numpy as np
from tinygrad import Tensor, TinyJit
from lama.runtime.compiler import ensure_compiler
ensure_compiler()
from lama.ops import matmul
x = Tensor(np.ones((512, 512), np.float32)).realize()
step = TinyJit(lambda: (matmul(x, x) + 1).realize())
run = lambda: float(step().numpy().sum())
before = [run() for _ in range(3)]
if sys.argv[1] == "fork":
    child = os.fork()
    if child == 0:
        os._exit([run() for _ in range(3)] != before)
    # One after the other: tinygrad's memory is shared with a child.
    failed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(failed or [run() for _ in range(3)] != before)
"""


@pytest.mark.parametrize("way", ["fork", "exit"])
@pytest.mark.parametrize("threads", ["1", "4"])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_kernels_run_after_a_fork_and_the_process_ends(threads, way):
    environment = {**os.environ, "LAMA_THREADS": threads}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, way], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_a_replayed_step_follows_its_inputs_and_variables(monkeypatch):
    run_on(monkeypatch, 2)

    @TinyJit
    def step(a: Tensor, b: Tensor, table: Tensor, n: UOp) -> tuple[Tensor, Tensor]:
        return gelu(matmul(a, b)).realize(), (table[:n].sum() + table[n]).realize()

    table = Tensor(np.arange(13, dtype=np.float32)).realize()
    for seed in range(5):
        a, b = normal(5, 7, seed=seed), normal(7, 11, seed=seed)
        y, s = step(Tensor(a).realize(), Tensor(b).realize(), table, UOp.variable("n", 1, 12).bind(seed + 3))
        assert np.abs(y.numpy() - gelu(Tensor(a @ b)).numpy()).max() < 1e-5
        assert s.item() == sum(range(seed + 3)) + seed + 3


def test_threads_are_those_asked_for_or_the_cores(monkeypatch):
    monkeypatch.delenv("LAMA_THREADS", raising=False)
    assert 1 <= pool.threads() <= (os.cpu_count() or 1)
    monkeypatch.setenv("LAMA_THREADS", "3")
    assert pool.threads() == 3
    monkeypatch.setattr("lama.runtime.compiler.cores", lambda: 20)
    monkeypatch.setenv("LAMA_THREADS", "80")
    assert pool.threads() == 80
    for wrong in ("0", "-1", "two", "1.5", "81", "9" * 5000):
        monkeypatch.setenv("LAMA_THREADS", wrong)
        with pytest.raises(
            UsageError,
            match=f"must be a whole number from 1 to 80, as this machine has 20 cores; got {wrong[:200]}",
        ):
            pool.threads()


def test_without_pthreads_the_caller_runs_every_slice(monkeypatch):
    monkeypatch.setattr(pool, "FUNCTIONS", ("no_such_function",))
    alone = pool.ThreadPool(4)
    monkeypatch.setattr(pool, "pool", lambda: alone)
    a, b, expected = product()
    assert np.abs(matmul(a, b).numpy() - expected).max() < 1e-3


def test_work_is_done_also_where_the_system_has_no_more_threads(monkeypatch):
    done: list[int] = []
    run_on(monkeypatch, 3)
    pool.on_threads(done.append, range(5))
    assert sorted(done) == [0, 1, 2, 3, 4]

    def none_left(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    done.clear()
    pool.on_threads(done.append, range(5))
    assert done == [0, 1, 2, 3, 4]
    assert list(pool.ahead(str, range(5))) == ["0", "1", "2", "3", "4"]
    alone = pool.ThreadPool(4)
    monkeypatch.setattr(pool, "pool", lambda: alone)
    a, b, expected = product()
    assert np.abs(matmul(a, b).numpy() - expected).max() < 1e-3


def test_results_come_in_order_and_few_are_computed_ahead(monkeypatch):
    run_on(monkeypatch, 3)
    begun: list[int] = []

    def inverse(n: int) -> float:
        begun.append(n)
        return 1 / (40 - n)

    found = pool.ahead(inverse, range(100))
    assert [next(found) for _ in range(4)] == [1 / (40 - n) for n in range(4)]
    assert max(begun) < 4 + 3 + 2
    with pytest.raises(ZeroDivisionError):
        list(found)
    assert max(begun) < 40 + 3 + 2


def test_a_captured_step_given_the_same_tensors_again_does_not_ask_tinyjit(monkeypatch):
    weight = Tensor(np.full((7, 7), 0.5, np.float32)).realize()
    put, step, asked = InputBuffer(), CapturedStep(lambda x: (matmul(x, weight) + x).realize()), []
    ask = type(step.jit).__call__
    monkeypatch.setattr(
        type(step.jit), "__call__", lambda self, *inputs: asked.append(inputs) or ask(self, *inputs)
    )
    for i in range(4):
        numbers = np.full((3, 7), i, np.float32)
        np.testing.assert_array_equal(step(put(numbers)).numpy(), numbers * 4.5)
    assert len(asked) == 1
