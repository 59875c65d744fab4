"""A run in its folder: what is kept, how it ends, and that it goes on as if it had not ended."""

import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import CATS, RUN
from safetensors.numpy import load_file, save_file
from tinygrad.nn.state import get_state_dict

import lama
from lama.cli import main
from lama.data import open_tokens
from lama.errors import LamaError, UsageError
from lama.tokenizers import CharacterTokenizer
from lama.training.folder import RunFolder
from lama.training.loop import Step
from lama.training.prepare import new_session, resumed_run
from lama.training.run import Run
from lama.training.session import Evaluation

Outcome = tuple[list[Any], dict[str, bytes]]


@pytest.fixture(scope="module")
def cats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "cats.txt"
    path.write_text(CATS)
    return path


@pytest.fixture
def start(cats: Path, tmp_path: Path) -> Callable[..., Run]:
    """Prepare a run of 12 steps with an evaluation after every third, in `out` unless told otherwise."""

    def start(name: str = "out", **changes: Any) -> Run:
        settings = {"corpus": [str(cats)], "steps": 12, "evaluate_every": 3, "warmup": 2, **RUN, **changes}
        run = new_session(RunFolder(tmp_path / name), settings, "lama train ...")
        run.measure_start()
        return run

    return start


def until(run: Run, step: int) -> None:
    """Iterate, and stop after `step`."""
    for event in run:
        if isinstance(event, Step) and event.step == step:
            run.stop()


def outcome(folder: RunFolder) -> Outcome:
    """All that a run's weights and reports are, without its timings."""
    timed = ("tokens_per_second", "mfu", "seconds", "peak_flops", "config", "corpus", "command")
    log = [
        {name: value for name, value in record.items() if name not in timed} for record in folder.read_log()
    ]
    files = [folder.path / "model.safetensors", *folder.path.glob("checkpoints/*/*.safetensors")]
    return log, {str(path.relative_to(folder.path)): path.read_bytes() for path in sorted(files)}


def steps_in(folder: RunFolder) -> list[int]:
    return [record["step"] for record in folder.read_log() if "loss" in record]


def leftovers(folder: RunFolder) -> list[str]:
    """What is half-written: hidden files and folders."""
    return [str(path) for path in folder.path.rglob(".*")]


@pytest.fixture(scope="module")
def whole(cats: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run of `start`, from its beginning to its end."""
    folder = RunFolder(tmp_path_factory.mktemp("whole") / "out")
    run = new_session(
        folder,
        {"corpus": [str(cats)], "steps": 12, "evaluate_every": 3, "warmup": 2, **RUN},
        "lama train ...",
    )
    run.measure_start()
    list(run)
    return folder


@pytest.fixture
def finished(whole: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of it, to be changed."""
    shutil.copytree(whole.path, tmp_path / "finished")
    return RunFolder(tmp_path / "finished")


def in_a_child(work: Callable[[], object]) -> int:
    """Do it in a new process that knows what this one has compiled; its id."""
    if child := os.fork():
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --- what a run leaves


def test_run_logs_every_step_and_evaluation_once_as_json(whole):
    first, *log = [
        json.loads(line, parse_constant=pytest.fail) for line in whole.log_file.read_text().splitlines()
    ]
    assert list(first["baselines"]) == ["uniform", "unigram", "bigram", "trigram"] and first["untrained"] > 5
    assert (first["command"], first["config"]["steps"], first["devices"]) == ("lama train ...", 12, 1)
    assert [record["step"] for record in log] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12, 12]
    for record in log:
        rest = ["step", "seconds"]
        if "loss" in record:
            assert sorted(record) == sorted(
                [*rest, "loss", "learning_rate", "gradient_norm", "tokens_per_second", "mfu"]
            )
        else:
            assert sorted(record) == sorted([*rest, "validation_loss", "bits_per_byte", "best"])
            # a byte is a token.
            assert record["bits_per_byte"] == pytest.approx(record["validation_loss"] / np.log(2))


def test_run_keeps_the_best_model_and_the_last_checkpoints(whole):
    assert sorted(path.name for path in whole.path.iterdir()) == [
        "checkpoints",
        "config.json",
        "data",
        "lama.json",
        "log.jsonl",
        "model.safetensors",
        "settings.toml",
    ]
    assert [path.name for path in whole.checkpoints()] == ["step-000009", "step-000012"]
    model, _ = lama.load(whole.path)
    for path in whole.checkpoints():
        assert lama.load(path)[0].config == model.config
    notes = json.loads((whole.path / "config.json").read_text())["training"]
    best = min(
        (record for record in whole.read_log() if "validation_loss" in record),
        key=lambda record: record["validation_loss"],
    )
    assert (
        notes["steps"] == best["step"]
        and notes["heldout_loss_nats_per_token"]["trained"] == best["validation_loss"]
    )


def test_model_of_the_lowest_held_out_loss_stays_on_top(start):
    run = start(steps=4, evaluate_every=1, keep=4)
    losses: Iterator[float] = iter([3.0, 1.0, 2.0, 1.5])
    run.evaluator = lambda _: next(losses)  # type: ignore[assignment,return-value]
    events = [event for event in run if isinstance(event, Evaluation)]
    assert [event.best for event in events] == [True, True, False, False]
    best = run.folder.path / "checkpoints" / "step-000002" / "model.safetensors"
    assert (run.folder.path / "model.safetensors").read_bytes() == best.read_bytes()


def test_saved_settings_train_the_same_model_again(whole, tmp_path):
    run = new_session(RunFolder(tmp_path / "again"), whole.settings(), "lama train ...")
    run.measure_start()
    list(run)
    assert outcome(run.folder) == outcome(whole)


# --- going on


def test_resumed_run_equals_one_that_never_ended(start, whole):
    """Stopped in the middle, gone on with in another process, stopped right at an evaluation, gone on with in
    a third.
    """
    run = start()
    until(run, 4)
    assert [path.name for path in run.folder.checkpoints()] == ["step-000003", "step-000004"]
    for step in (9, 12):
        assert ended(in_a_child(lambda step=step: until(resumed_run(run.folder, {}), step))) == 0
        assert steps_in(run.folder) == list(range(1, step + 1))
    (log, files), (expected_log, expected_files) = outcome(run.folder), outcome(whole)
    assert log == expected_log
    for name in (
        "model.safetensors",
        "checkpoints/step-000012/model.safetensors",
        "checkpoints/step-000012/training.safetensors",
    ):
        assert files[name] == expected_files[name], name


GO_ON = """
import sys
from lama.training.folder import RunFolder
from lama.training.prepare import resumed_run
list(resumed_run(RunFolder(sys.argv[1]), {}))
"""


@pytest.mark.slow
def test_hundred_steps_and_a_hundred_in_a_new_process_equal_two_hundred_at_once(start):
    whole = start("whole", steps=200, evaluate_every=100)
    list(whole)
    parts = start("parts", steps=200, evaluate_every=100)
    until(parts, 100)
    subprocess.run([sys.executable, "-c", GO_ON, str(parts.folder.path)], check=True)
    assert steps_in(parts.folder) == list(range(1, 201))
    assert outcome(parts.folder) == outcome(whole.folder)


def test_evaluation_that_the_end_of_the_process_cut_off_is_made_up_for(start, whole):
    run = start()
    for event in run:
        if isinstance(event, Step) and event.step == 6:
            run.evaluator = None  # type: ignore[assignment]  (the checkpoint is written, then this process fails)
            break
    with pytest.raises(TypeError):
        list(_rest(run))
    assert run.folder.checkpoints()[-1].name == "step-000006"
    list(resumed_run(run.folder, {}))
    assert outcome(run.folder) == outcome(whole)


def _rest(run: Run) -> Iterator[Any]:
    """What comes after a step that was just taken: here, its checkpoint and its evaluation."""
    run.save_checkpoint()
    yield run.evaluate()


def test_stop_at_the_last_step_still_judges_the_model(start, whole):
    run = start()
    until(run, 12)
    assert run.finished and outcome(run.folder) == outcome(whole)


def test_stopped_run_has_a_model_to_try_before_its_first_evaluation(start):
    run = start()
    until(run, 1)
    assert [path.name for path in run.folder.checkpoints()] == ["step-000001"]
    lama.load(run.folder.path)


def kill_often(run: Run, kills: int, begin: Callable[[str], Run]) -> tuple[int, list[RunFolder]]:
    """Go on with `run` in processes that are killed, `kills` times at random moments; with another one when
    it is finished.

    After each kill, all that has the name of a checkpoint must load. How many steps were taken again, and the
    finished runs.
    """
    rng, done, again = random.Random(0), [], 0
    while kills:
        folder = run.folder
        before = folder.log_file.stat().st_size
        child = in_a_child(lambda: list(resumed_run(folder, {})))  # noqa: B023
        while folder.log_file.stat().st_size <= before and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.002)  # it is still starting
        time.sleep(rng.uniform(0, 0.4))
        try:
            os.kill(child, signal.SIGKILL)
            killed = ended(child) == -signal.SIGKILL
        except (ProcessLookupError, ChildProcessError):
            killed = False
        kills -= killed
        for path in folder.checkpoints():
            lama.load(path)
            assert (path / "training.safetensors").exists() and (path / "training.json").exists()
        if (folder.path / "config.json").exists():
            lama.load(folder.path)
        again += len(steps_in(folder)) - int(folder.checkpoints()[-1].name[5:])
        if not killed:
            done.append(folder)
            run = begin(f"another-{len(done)}")
            until(run, 1)
    list(resumed_run(run.folder, {}))
    return again, [*done, run.folder]


def check_kills(start: Callable[..., Run], steps: int, kills: int) -> None:
    options = {"steps": steps, "evaluate_every": 1}
    whole = start("whole", **options)
    list(whole)

    def begin(name: str) -> Run:
        return start(name, **options)

    run = begin("killed")
    until(run, 1)
    _, folders = kill_often(run, kills, begin)
    for folder in folders:
        assert outcome(folder) == outcome(whole.folder)
        assert steps_in(folder) == list(range(1, steps + 1))
        assert leftovers(folder) == []


def test_killed_run_always_has_a_checkpoint_and_comes_to_the_same_end(start):
    check_kills(start, steps=8, kills=3)


@pytest.mark.parametrize("moment", ["measure", "_drop_old", "log"])
def test_run_killed_around_its_last_evaluation_leaves_no_more_checkpoints(start, monkeypatch, moment):
    options = {"steps": 4, "evaluate_every": 1}
    whole = start("whole", **options)
    list(whole)
    run = start("killed", **options)
    until(run, 3)
    run = resumed_run(run.folder, {})
    place = run.folder if moment == "log" else run
    plain = getattr(place, moment)

    def killed(*arguments: object) -> object:
        if run.step == 4 and "loss" not in dict(*arguments):  # not the step's own record
            raise GeneratorExit  # nothing in lama handles it
        return plain(*arguments)

    with monkeypatch.context() as patch, pytest.raises(GeneratorExit):
        patch.setattr(place, moment, killed)
        list(run)
    list(resumed_run(run.folder, {}))
    assert outcome(run.folder) == outcome(whole.folder)


@pytest.mark.slow
def test_fifty_kills_at_random_moments_change_nothing(start):
    check_kills(start, steps=60, kills=50)


def test_log_line_that_was_cut_short_is_taken_again(start, whole):
    run = start()
    until(run, 5)
    with open(run.folder.log_file, "a") as file:
        file.write('{"step": 6, "loss": 1.5}\n{"step": 7, "lo')
    list(resumed_run(run.folder, {}))
    assert outcome(run.folder)[0] == outcome(whole)[0]


def first_line(text: str) -> Callable[[Path], None]:
    def damage(log: Path) -> None:
        log.write_text("\n".join([text, *log.read_text().split("\n")[1:]]))

    return damage


def one_more(content: bytes) -> Callable[[Path], None]:
    return lambda log: log.write_bytes(log.read_bytes() + content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda log: log.write_bytes(b"\xff\xfe\n"), "log.jsonl must be valid JSON; got "),
        (lambda log: log.write_bytes(b"5\n"), "line 1 of .*log.jsonl must be an object; got 5"),
        (one_more(b'{"step": "x"}\n'), "step in line 8 of .*log.jsonl must be a whole number; got 'x'"),
        (one_more(b"[" * 100_000 + b"\n"), "got over 100 levels"),
        (one_more(b"\0\0\n"), "log.jsonl must be valid JSON; got "),
        (first_line('{"devices": "many"}'), "must have baselines; got devices"),
        (
            first_line('{"baselines": {"bigram": "low"}, "untrained": 5}'),
            "bigram in line 1 of .*log.jsonl must be a number; got 'low'",
        ),
        (
            lambda log: os.mkfifo(log.rename(log.with_name("moved")).with_name("log.jsonl")),
            "must be a regular file; got a pipe",
        ),
        (lambda log: log.write_bytes(b""), None),
        (lambda log: log.unlink(), None),
        (
            lambda log: log.write_text(
                "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[:1])
            ),
            None,
        ),
    ],
)
def test_damaged_log_costs_the_curve_only(start, whole, capsys, damage, said):
    run = start()
    until(run, 5)
    damage(run.folder.log_file)
    capsys.readouterr()
    again = resumed_run(run.folder, {})
    err = capsys.readouterr().err
    assert (again.baselines, again.untrained, again.best) == (run.baselines, run.untrained, run.best)
    list(again)
    assert outcome(run.folder)[1] == outcome(whole)[1] and steps_in(run.folder)[-7:] == [
        6,
        7,
        8,
        9,
        10,
        11,
        12,
    ]
    damaged = run.folder.path / "log.jsonl.damaged"
    if said is None:
        assert err == "" and not damaged.exists()
    else:
        assert (
            re.fullmatch(
                rf"lama: .*{said}.*\. log.jsonl is now log.jsonl.damaged, and a new one begins\n", err
            )
            and damaged.exists()
        )


def test_log_that_cannot_be_written_is_not_taken_for_a_damaged_one(start, monkeypatch):
    run = start()
    until(run, 5)
    before = run.folder.log_file.read_bytes()

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LamaError, match=r"log.jsonl cannot be written: No space left"):
        resumed_run(run.folder, {})
    assert run.folder.log_file.read_bytes() == before


def test_checkpoint_of_an_earlier_version_is_gone_on_with_without_its_log(start, whole):
    run = start()
    until(run, 5)
    path = run.folder.last_checkpoint() / "training.json"
    notes = json.loads(path.read_text())
    path.write_text(json.dumps({name: notes[name] for name in ("step", "data", "config")}))
    (run.folder.path / "lama.json").unlink()
    run.folder.log_file.unlink()
    again = resumed_run(run.folder, {})
    assert again.baselines == run.baselines and again.untrained == run.baselines["uniform"]
    list(again)
    assert outcome(run.folder)[1] == outcome(whole)[1]
    assert RunFolder(run.folder.path).is_older_run()


def test_settings_about_reports_may_change_on_the_way(start, whole):
    run = start()
    until(run, 5)
    list(resumed_run(run.folder, {"keep": 5, "evaluate_every": 4}))
    assert [path.name for path in run.folder.checkpoints()] == [f"step-{n:06d}" for n in (3, 5, 8, 12)]
    last = "checkpoints/step-000012/training.safetensors"
    assert outcome(run.folder)[1][last] == outcome(whole)[1][last]


# --- what cannot be gone on with


def test_resume_with_other_settings_is_refused_and_names_them(finished):
    message = (
        "a resumed run must have the settings it began with; got learning_rate was 0.01 and is "
        "0.02; seed was 0 and is 3. For another"
    )
    with pytest.raises(UsageError, match=re.escape(message)):
        resumed_run(finished, {"seed": 3, "learning_rate": 0.02, "keep": 9})


def test_resume_with_edited_settings_is_refused_and_names_them(finished):
    text = finished.settings_file.read_text()
    finished.settings_file.write_text(
        text.replace("dropout = 0.1", "dropout = 0.5").replace("keep = 2", "keep = 3")
    )
    with pytest.raises(
        UsageError, match=re.escape("the settings it began with; got dropout was 0.1 and is 0.5. For")
    ):
        resumed_run(finished, {})
    assert resumed_run(finished, {"dropout": 0.1}).config.keep == 3


@pytest.mark.parametrize("config", [None, [], {"dropping": 0.5}])
def test_checkpoint_without_the_settings_of_its_run_is_refused(finished, config):
    path = finished.checkpoints()[-1] / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": config}))
    with pytest.raises(
        LamaError,
        match=r"training.json must hold (the run's config; got|only settings of lama train; got 'dropping')",
    ):
        resumed_run(finished, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 5}, "must be of step 12, as its folder is named; got step 5"),
        ({"step": True}, "step in .*training.json must be a whole number; got True"),
        ({"data": 5}, "must read the data it began with"),
        ({"devices": "many"}, "devices in .*training.json must be a whole number; got 'many'"),
        ({"baselines": [1]}, r"baselines in .*training.json must be an object; got \[1\]"),
    ],
)
def test_checkpoint_with_other_notes_is_refused(finished, changes, message):
    path = finished.checkpoints()[-1] / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(LamaError, match=message):
        resumed_run(finished, {})


@pytest.mark.parametrize("dtype", [np.int32, np.float16, np.float64])
def test_optimizer_state_of_another_dtype_is_refused(finished, dtype):
    path = finished.checkpoints()[-1] / "training.safetensors"
    save_file({name: array.astype(dtype) for name, array in load_file(path).items()}, path)
    with pytest.raises(
        LamaError, match=rf"training.safetensors must hold float32; got {np.dtype(dtype).name} for m\."
    ):
        resumed_run(finished, {})


def test_optimizer_state_that_is_not_finite_is_refused(finished):
    path = finished.checkpoints()[-1] / "training.safetensors"
    save_file({name: array + np.float32("nan") for name, array in load_file(path).items()}, path)
    with pytest.raises(LamaError, match="weights must be finite; got NaN"):
        resumed_run(finished, {})


def test_settings_beyond_reason_are_refused(finished):
    text = finished.settings_file.read_text()
    for steps, message in (
        ("1" + "0" * 26, "steps must be at most 1000000000; got 1000"),
        ('"abc"', "steps must be of type int; got 'abc'"),
    ):
        finished.settings_file.write_text(text.replace("steps = 12", f"steps = {steps}"))
        with pytest.raises(UsageError, match=message):
            resumed_run(finished, {})
    finished.settings_file.write_text("a = " + "[" * 100_000)
    with pytest.raises(LamaError, match="must be valid TOML; got: over 100 levels"):
        resumed_run(finished, {})


@pytest.mark.parametrize("source", ["{}", "{}/**/*.txt"])
def test_folder_that_the_run_lies_in_is_its_corpus_without_the_run(start, tmp_path, source):
    (tmp_path / "cats.txt").write_text(CATS)
    run = start("runs/a", corpus=[source.format(tmp_path)], steps=2)
    until(run, 1)
    (run.folder.path / "notes.txt").write_text("of the run")
    assert resumed_run(run.folder, {}).trainer.step == 1


def test_resume_with_a_changed_corpus_is_refused(start, cats, tmp_path):
    corpus = tmp_path / "corpus.txt"
    shutil.copy(cats, corpus)
    run = start(corpus=[str(corpus)], steps=2)
    until(run, 1)
    with open(corpus, "a") as file:
        file.write("the end")
    with pytest.raises(
        LamaError, match=r"must read the text it began with; got corpus.txt, which has changed"
    ):
        resumed_run(run.folder, {})
    corpus.unlink()  # the tokens are there: the text is not needed
    assert resumed_run(run.folder, {}).trainer.step == 1


def test_resume_with_changed_tokens_is_refused(finished):
    path = finished.data / "train.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(LamaError, match=r"train.bin must have SHA-256 \w+, as meta.json says; got "):
        resumed_run(finished, {})


def test_resume_with_the_tokens_of_another_run_is_refused(finished, cats, start):
    shutil.rmtree(finished.data)
    shutil.copytree(start("other", validation=0.2).folder.data, finished.data)
    with pytest.raises(
        LamaError, match=r"must read the data it began with; got other data in .*data than at step-000012"
    ):
        resumed_run(finished, {})


def test_resume_with_another_vocabulary_is_refused(finished):
    checkpoint = finished.checkpoints()[-1]
    model, _ = lama.load(checkpoint)
    lama.save(checkpoint, model, CharacterTokenizer("abc"))
    with pytest.raises(LamaError, match=r"got another in .*step-000012 \(3 tokens\) than in .*data \(\d+\)$"):
        resumed_run(finished, {})


def test_resume_on_another_number_of_devices_is_refused(finished):
    with pytest.raises(UsageError, match=r"the number of devices it began with; got 2. Give --devices 1"):
        resumed_run(finished, {}, ("CPU", "CPU:1"))


def test_resume_where_there_is_nothing_to_go_on_with_is_refused(start, tmp_path):
    with pytest.raises(
        LamaError,
        match=r"no run to resume in .*none: no settings.toml. Give the --out of a lama train$",
    ):
        resumed_run(RunFolder(tmp_path / "none"), {})
    run = start()
    with pytest.raises(
        LamaError,
        match=r"no checkpoint to resume from in .*out. Start it again: lama train .*toml",
    ):
        resumed_run(run.folder, {})


def test_finished_run_has_nothing_left_to_do(finished):
    run = resumed_run(finished, {})
    before = outcome(finished)
    assert run.finished and list(run) == [] and outcome(finished) == before


# --- numbers that are none, full disks


def test_loss_that_is_no_number_names_the_step_and_the_last_good_checkpoint(start):
    run = start()
    message = (
        r"training diverged at step 5: loss=nan, gradient norm=nan. Lower the learning "
        r"rate. The last good checkpoint "
        r"is (.*step-000003): continue with (lama train .*settings.toml --from \1 --out .*out-2 "
        r"--learning-rate 0.003)$"
    )
    with pytest.raises(LamaError, match=message) as error:
        for event in run:
            if isinstance(event, Step) and event.step == 4:
                weight = get_state_dict(run.model)["ln_final.weight"]
                weight.assign(weight * float("nan")).realize()
    assert all(
        np.isfinite(p.numpy()).all()
        for p in get_state_dict(lama.load(run.folder.checkpoints()[-1])[0]).values()
    )
    assert steps_in(run.folder) == [1, 2, 3, 4]
    found = re.search(message, str(error.value))
    # As said, and one step teaches little.
    assert found and main([*shlex.split(found[2])[1:], "--steps", "1"]) in (0, 1)
    assert steps_in(RunFolder(run.folder.path.with_name("out-2"))) == [1]


def test_learning_rate_beyond_reason_ends_with_one_message_and_no_bad_checkpoint(start):
    run = start(evaluate_every=1, learning_rate=1e30, warmup=0)
    with pytest.raises(
        LamaError, match=r"diverged at .* Lower the learning rate\. (The last good|There is no) checkpoint"
    ):
        list(run)
    for path in run.folder.checkpoints():
        assert all(np.isfinite(p.numpy()).all() for p in get_state_dict(lama.load(path)[0]).values())
    assert leftovers(run.folder) == []


def full_disk_after(folder: RunFolder, n_bytes: int, message: str) -> None:
    """Go on with a run in a process that may write no file longer than `n_bytes`: it fails with one
    message.
    """

    def work() -> None:
        run = resumed_run(folder, {})
        # As Python has it, the signal is ignored: EFBIG comes.
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
        with pytest.raises(LamaError) as error:
            list(run)
        assert re.search(message, str(error.value)) and "\n" not in str(error.value), error.value

    assert ended(in_a_child(work)) == 0


def test_one_folder_is_one_process_s_at_a_time(tmp_path):
    code = (
        "import sys; from lama.training.folder import RunFolder\nwith "
        "RunFolder(sys.argv[1]).alone(): print('in'); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "in\n"
        with (
            pytest.raises(LamaError, match="another process is working in"),
            RunFolder(tmp_path / "run").alone(),
        ):
            pass
        with RunFolder(tmp_path / "another").alone():
            pass
        other.kill()
    with RunFolder(tmp_path / "run").alone():
        # The lock lies beside what it locks.
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["lama.json"]
    assert list((tmp_path / "run").iterdir()) == []


def test_full_disk_leaves_the_previous_checkpoint_and_nothing_half_written(start, whole):
    run = start()
    until(run, 4)
    good = "The last good checkpoint is .*step-000004: continue with lama train --resume "
    log, sizes = (
        run.folder.log_file.stat().st_size,
        [path.stat().st_size for path in run.folder.checkpoints()[-1].glob("*.safetensors")],
    )
    assert log + 1000 < min(sizes) < max(sizes) - 1000
    for n_bytes, file in (
        (min(sizes) - 100, "step-000006.*model.safetensors cannot be written"),
        (max(sizes) - 100, "step-000006.*training.safetensors cannot be written"),
        (log + 30, "log.jsonl cannot be written"),
    ):
        full_disk_after(run.folder, n_bytes, f"{file}: File too large.*{good}")
        assert [path.name for path in run.folder.checkpoints()] == ["step-000003", "step-000004"]
        assert leftovers(run.folder) == []
        lama.load(run.folder.path)
    list(resumed_run(run.folder, {}))
    assert outcome(run.folder) == outcome(whole)


def test_full_disk_at_the_start_leaves_no_folder(start, tmp_path):
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with pytest.raises(LamaError, match="cannot be written: File too large"):
            start()

    assert ended(in_a_child(work)) == 0
    assert list(tmp_path.iterdir()) == []


# --- what a new run refuses


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (
            None,
            {},
            "a corpus must be a file, a folder, a pattern, - or one of kjv, tinyshakespeare; got "
            ".*corpus.txt: No such file",
        ),
        (b"", {}, "a corpus must hold some text; got an empty file"),
        (
            b"text\x00text",
            {},
            "a corpus must be text; got byte 0x00 at offset 4 of .*corpus.txt, which looks like a "
            "binary file",
        ),
        (
            b"x" * 21,
            {},
            "the training part of the corpus must be longer than context_length; got 18 tokens, "
            "context_length=19. Use a longer",
        ),
        (
            b"x" * 150,
            {},
            "the held-out part of the corpus must be longer than context_length; got 15 tokens, "
            "context_length=19",
        ),
        (b"x" * 500, {"d_model": 23}, "d_model must be a multiple of n_heads; got d_model=23, n_heads=2"),
        (
            b"x" * 500,
            {"batch_size": 2**40},
            "training needs over .* GB for the model and a batch; .* Raise accumulation=2: "
            "batch_size=1099511627776 is in",
        ),
        (
            b"x" * 500,
            {"d_model": 2**21},
            "training needs over .* GB for weights, .*; this machine has .*Reduce n_layers=1 or "
            "d_model=2097152",
        ),
        (
            b"x" * 500,
            {"tokenizer": "words"},
            r"tokenizer must be bytes, character, gpt2, bpe:SIZE or a folder; got 'words'",
        ),
        (
            b"x" * 500,
            {"tokenizer": "bpe:many"},
            r"tokenizer must be bpe:SIZE, such as bpe:2000; got 'bpe:many'",
        ),
        (b"x" * 500, {"initial": "./none"}, "model must be"),
    ],
)
def test_run_that_cannot_be_leaves_no_folder(start, tmp_path, content, changes, message):
    corpus = tmp_path / "corpus.txt"
    if content is not None:
        corpus.write_bytes(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(LamaError, match=message):
        start("new/out", **{"corpus": [str(corpus)], **changes})
    assert sorted(tmp_path.iterdir()) == before


def test_run_that_cannot_be_leaves_an_earlier_one_as_it_was(finished, tmp_path):
    def state() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in finished.path.rglob("*") if path.is_file()}

    before, corpus = state(), tmp_path / "corpus.txt"
    corpus.write_bytes(b"good text\n" * 100_000 + b"\xff")  # found out in the middle
    with pytest.raises(LamaError, match=r"a corpus must be UTF-8 text; got byte 0xff at offset 1000000 of "):
        new_session(finished, {"corpus": [str(corpus)], **RUN}, "lama train ...")
    assert state() == before


def test_text_that_the_model_cannot_spell_is_refused_and_leaves_no_folder(tmp_path):
    model = lama.GPT(lama.GPTConfig(3, 19, d_model=22, n_layers=1, n_heads=2))
    lama.save(tmp_path / "abc", model, CharacterTokenizer("abc"))
    (tmp_path / "corpus.txt").write_text("abcabcd" * 100)
    settings = {"corpus": [str(tmp_path / "corpus.txt")], "initial": str(tmp_path / "abc")}
    with pytest.raises(LamaError, match="'d'"):
        new_session(RunFolder(tmp_path / "out"), settings, "lama train ...")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("initial", [".", "checkpoints/step-000009"])
def test_run_must_not_write_over_the_model_it_starts_from(finished, cats, initial):
    with pytest.raises(UsageError, match="--out must not be the folder of the model to start from; got "):
        new_session(
            finished, {"corpus": [str(cats)], "initial": str(finished.path / initial)}, "lama train ..."
        )


def test_new_run_takes_the_place_of_an_earlier_one(finished, cats):
    (finished.path / "loss.png").touch()
    (finished.path / ".data-123").mkdir()
    (finished.path / ".saving-123").mkdir()
    model = (finished.path / "model.safetensors").read_bytes()
    new_session(finished, {"corpus": [str(cats)], **RUN, "validation": 0.2}, "lama train ...")
    names = sorted(path.name for path in finished.path.iterdir())
    assert names == ["config.json", "data", "lama.json", "model.safetensors", "settings.toml"]
    assert (finished.path / "model.safetensors").read_bytes() == model  # until there is another
    assert finished.settings()["validation"] == 0.2
    assert len(open_tokens(finished.data, verify=True).validation) == 0.2 * len(CATS)


def test_new_run_leaves_what_is_not_a_run_s(finished, cats, tmp_path):
    """Also behind links, and in the folders that it empties."""
    there = tmp_path / "there"
    shutil.copytree(finished.path / "checkpoints", there)
    for path in (
        finished.path / "checkpoints" / "mine.txt",
        finished.data / "mine.txt",
        finished.path / ".mine.tmp",
    ):
        path.write_text("mine")
    (finished.path / "loss.png").symlink_to(there / "photo.png")
    (there / "photo.png").write_text("mine")
    finished.log_file.unlink()
    finished.log_file.symlink_to(there / "log.jsonl")
    (there / "log.jsonl").write_text("mine")
    before = sorted(there.rglob("*"))
    new_session(finished, {"corpus": [str(cats)], **RUN}, "lama train ...")
    for path in ("checkpoints/mine.txt", "data/mine.txt", ".mine.tmp"):
        assert (finished.path / path).read_text() == "mine"
    assert finished.checkpoints() == [] and not finished.log_file.exists()
    shutil.rmtree(finished.path / "checkpoints")
    (finished.path / "checkpoints").symlink_to(there)
    new_session(finished, {"corpus": [str(cats)], **RUN}, "lama train ...")
    assert (
        sorted(there.rglob("*")) == before
        and (there / "photo.png").read_text() == (there / "log.jsonl").read_text() == "mine"
    )


def test_run_on_two_devices_is_gone_on_with_on_two(start, tmp_path):
    settings = start("one", batch_size=12).folder.settings()
    shared = new_session(RunFolder(tmp_path / "two"), settings, "lama train ...", devices=("CPU", "CPU:1"))
    shared.measure_start()
    assert [replica.device for replica in shared.trainer.replicas] == ["CPU", "CPU:1"]
    assert shared.folder.read_log()[0]["devices"] == 2
    with pytest.raises(
        LamaError, match=r"Start it again: lama train .*settings.toml --out .*two --devices 2$"
    ):
        resumed_run(shared.folder, {})
    until(shared, 1)
    with pytest.raises(UsageError, match=r"the number of devices it began with; got 1. Give --devices 2"):
        resumed_run(shared.folder, {})
    assert shared.resume_command == f"lama train --resume {shared.folder.path} --devices CPU,CPU:1"
    assert resumed_run(shared.folder, {}, ("CPU", "CPU:1")).trainer.step == 1


def test_batch_that_devices_cannot_share_is_refused(start, tmp_path):
    with pytest.raises(
        UsageError,
        match="batch_size must be a multiple of devices x accumulation; got batch_size=6, 2 devices",
    ):
        new_session(
            RunFolder(tmp_path / "out"),
            start("other").folder.settings(),
            "lama train ...",
            devices=("CPU", "CPU:1"),
        )
    assert not (tmp_path / "out").exists()
