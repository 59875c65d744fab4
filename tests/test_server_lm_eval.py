"""lm-evaluation-harness scores `lama serve` as `lama eval` and its own transformers class do.

No network: the tasks and their data are files written here, the weights are random.
"""

import importlib
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.random_gpt2 import make_config, make_weights, write_folder

import lama
from lama.cli import main
from lama.tokenizers.bpe import gpt2_files

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
pytestmark = pytest.mark.peers
CONTEXT, END = 96, 50256
TEXT = "the a king river said that was in of and boat went over hill green not with seven tall Ships"
TASKS = {
    "ends": {  # as lambada_openai
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": ["perplexity", "acc"],
    },
    "choices": {  # as hellaswag
        "output_type": "multiple_choice",
        "doc_to_text": "{{activity_label}}: {{ctx_a}} {{ctx_b.capitalize()}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "endings",
        "metric_list": ["acc", "acc_norm"],
    },
    "whole": {  # as wikitext
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": ["bits_per_byte", "byte_perplexity"],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": ["exact_match"],
    },
}
Scores = dict[tuple[str, str], float]


def sentence(rng: random.Random, n: int) -> str:
    return " ".join(rng.choices(TEXT.split(), k=n))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint, the tasks' descriptions and their data."""
    folder = tmp_path_factory.mktemp("harness")
    shape = {"n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = make_config(**shape, bos_token_id=END, eos_token_id=END)
    weights = make_weights(config, std=0.3)
    bias = weights["ln_f.bias"]
    weights["wte.weight"][END] = 10 * bias / np.linalg.norm(bias)  # the likeliest token after some texts
    write_folder(folder / "model", config, weights)
    for name, content in gpt2_files().items():
        (folder / "model" / name).write_bytes(content)
    model, tokenizer = lama.load(folder / "model")

    def greedy(prompt: str, n: int) -> str:
        return str(lama.generate(model, tokenizer, prompt, max_new_tokens=n, temperature=0))

    rng, data = random.Random(0), dict[str, list[dict[str, Any]]]()
    texts = [sentence(rng, rng.randint(3, 70)) for _ in range(20)]
    own = [text + word for text in texts if len((word := greedy(text, 1)).split()) == 1 and word[0] == " "]
    ended = [text for text in texts + own if not greedy(text, 1)]
    assert len(own) > 2 and len(ended) > 2, (len(own), len(ended))
    data["ends"] = [{"text": text} for text in texts + own]
    data["choices"] = []
    for _ in range(12):
        ctx_a, ctx_b = sentence(rng, 5), sentence(rng, rng.randint(3, 40))
        endings = [sentence(rng, rng.randint(1, 8)) for _ in range(4)]
        label = rng.randrange(4)
        data["choices"].append(
            {"activity_label": "Rowing", "ctx_a": ctx_a, "ctx_b": ctx_b, "endings": endings, "label": label}
        )
    data["whole"] = [{"text": " " + sentence(rng, n)} for n in (60, 5, 300)]
    data["answers"] = [
        {"question": text, "answer": greedy(text, 6).partition("\n")[0]} for text in texts if greedy(text, 1)
    ]
    for name, task in TASKS.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(item) + "\n" for item in data[name]))
        metrics = [{"metric": metric} for metric in task["metric_list"]]
        about = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}
        about |= {"test_split": "test", **task, "metric_list": metrics}
        (folder / f"{name}.yaml").write_text(json.dumps(about))  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Any]:
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    pytest.importorskip("lm_eval", reason="not installed: pip install 'lm_eval[api]'")
    pytest.importorskip("tenacity", reason="not installed: pip install 'lm_eval[api]'")
    from serve_client import Server, lama_command

    with Server(lama_command(folder / "model", 4, CONTEXT), folder / "log", wait=120) as server:
        yield server


def scores(folder: Path, name: str, tasks: list[str], arguments: dict[str, Any]) -> Scores:
    """What the harness finds by (task, metric)."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    lm_eval = importlib.import_module("lm_eval")
    tasks_here = importlib.import_module("lm_eval.tasks").TaskManager(
        include_path=str(folder), include_defaults=False
    )
    found = lm_eval.simple_evaluate(
        model=name,
        model_args=arguments,
        tasks=tasks,
        task_manager=tasks_here,
        bootstrap_iters=0,
        device="cpu",
    )
    return {
        (task, metric.removesuffix(",none")): value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if metric.endswith(",none") and isinstance(value, float | int) and "stderr" not in metric
    }


def through_server(folder: Path, server: Any, tasks: list[str], **arguments: Any) -> Scores:
    fixed = {"base_url": f"http://127.0.0.1:{server.port}/v1/completions", "model": "lama"}
    fixed |= {"tokenizer_backend": "remote", "max_length": CONTEXT, "max_gen_toks": 6}
    return scores(folder, "local-completions", tasks, fixed | arguments)


def own_class(folder: Path, tasks: list[str], **arguments: Any) -> Scores:
    """The harness's transformers class, with windows of as many tokens as its HTTP class has."""
    pytest.importorskip("transformers")
    fixed = {"pretrained": str(folder / "model"), "dtype": "float32", "max_length": CONTEXT - 2}
    return scores(folder, "hf", tasks, fixed | arguments)


def lama_eval(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["eval", "--json", *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("options", [{}, {"batch_size": 4, "num_concurrent": 3}])
def test_scores_are_those_of_the_harness_own_class(folder: Path, server: Any, options: dict[str, Any]):
    ours, theirs = through_server(folder, server, list(TASKS), **options), own_class(folder, list(TASKS))
    assert ours.keys() == theirs.keys() and len(ours) == 7
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert 0 < ours["ends", "acc"] < 1 and ours["answers", "exact_match"] == 1


def test_scores_are_those_of_lama_eval(folder: Path, server: Any, capsys: pytest.CaptureFixture[str]):
    ours = through_server(folder, server, ["ends", "choices"])
    flags = ["-m", folder / "model", "--context-length", CONTEXT - 2]
    for task, name in (("ends", "lambada"), ("choices", "hellaswag")):
        found = lama_eval(capsys, *flags, "--task", name, "--data", folder / f"{task}.jsonl")
        metrics = {metric: value for (each, metric), value in ours.items() if each == task}
        assert metrics == pytest.approx({metric: found[metric] for metric in metrics}, rel=1e-4)


def test_rolling_scores_are_the_perplexity_of_lama_eval(
    folder: Path, server: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """`lama eval` scores all but a text's first token, which the harness gets as the prefix."""
    _, tokenizer = lama.load(folder / "model")
    rest = " " + sentence(random.Random(1), 60)
    text = "Once" + rest
    first, *others = tokenizer.encode(text)
    assert tokenizer.encode(rest) == others
    (tmp_path / "rest.jsonl").write_text(json.dumps({"text": rest}))
    about = json.loads((folder / "whole.yaml").read_text())
    about |= {"task": "rest", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rest.jsonl")}}}
    (tmp_path / "rest.yaml").write_text(json.dumps(about))
    ours = through_server(tmp_path, server, ["rest"], custom_prefix_token_id=first)
    (tmp_path / "text.txt").write_text(text)
    found = lama_eval(capsys, "-m", folder / "model", "--text", tmp_path / "text.txt")
    assert ours["rest", "bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=1e-4)


# --- without a server


def test_harness_in_this_process_scores_as_its_own_class_and_lama_eval(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("lm_eval", reason="not installed: pip install lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    flags = ["-m", folder / "model", "--context-length", CONTEXT - 2]
    found = lama_eval(capsys, *flags, "--harness", ",".join(TASKS), "--include", folder)["results"]
    ours = {(task, name): value for task, metrics in found.items() for name, value in metrics.items()}
    theirs = own_class(folder, list(TASKS))
    assert {key: ours[key] for key in theirs} == pytest.approx(theirs, rel=1e-4)
    assert ours["choices", "acc_stderr"] > 0
    for task, name in (("ends", "lambada"), ("choices", "hellaswag")):
        own = lama_eval(capsys, *flags, "--task", name, "--data", folder / f"{task}.jsonl")
        metrics = {metric: value for (each, metric), value in theirs.items() if each == task}
        assert {metric: own[metric] for metric in metrics} == pytest.approx(metrics, rel=1e-4)
    few = lama_eval(capsys, *flags, "--harness", "choices", "--include", folder, "--limit", 3)["results"]
    assert few["choices"]["acc"] in (0, 1 / 3, 2 / 3, 1)


def test_what_the_harness_cannot_do_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("lm_eval", reason="not installed: pip install lm_eval")
    model = ["-m", str(folder / "model")]
    for words, code, message in (
        (["--harness", "nothing"], 2, "a task must be one of the harness or of --include; got 'nothing'"),
        (["--harness", "a", "--text", "b"], 2, "give one of --text FILE, --task TASK with --data FILE, and"),
        (
            ["--text", "b", "--shots", "1"],
            2,
            "--shots must be given with --harness; got --shots 1 without it",
        ),
    ):
        assert main(["eval", *model, *words]) == code
        assert message in capsys.readouterr().err.splitlines()[-1]
