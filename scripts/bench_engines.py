"""Engines that bench_cpu.py compares, each behind the same few functions.

    python scripts/bench_engines.py ENGINE WEIGHTS MODEL THREADS

runs a worker of workers.py with one engine. MODEL is a folder in Hugging Face's format or, with the WEIGHTS
`gguf`, a GGUF file. `start` or `convert` before these arguments call the functions of these names. The peers'
files (GGUF, CTranslate2) are written to the folder on first use. The environment variables LLAMA_TOOLS and
IK_LLAMA_TOOLS name the folders with the programs of llama.cpp and ik_llama.cpp.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from workers import Answer, answer_requests

NEEDS = {  # packages, or a folder of programs
    "lama": (),
    "llama.cpp": ("llama_cpp", "gguf"),
    "llama-batched-bench": ("LLAMA_TOOLS",),
    "ik_llama.cpp": ("IK_LLAMA_TOOLS",),
    "OpenVINO GenAI": ("openvino_genai",),
    "CTranslate2": ("ctranslate2", "transformers", "torch"),
    "transformers": ("transformers", "torch"),
    "PyTorch": ("torch",),
}
TOOLS = {"LLAMA_TOOLS": "--llama-tools", "IK_LLAMA_TOOLS": "--ik-llama-tools"}  # options of bench_cpu.py
FILE = "gguf"  # the weights of a file as it is
CONTEXT = 1024  # tokens, of every engine that is told
PROMPT = "How can entropy be reversed?"


def missing(engine: str) -> str:
    """Why the engine cannot be measured; empty if it can."""
    if lacking := [TOOLS[need] for need in NEEDS[engine] if need in TOOLS and need not in os.environ]:
        return f"not given: {lacking[0]}"
    packages = [need for need in NEEDS[engine] if need not in TOOLS]
    lacking = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else ""


def bytes_read(model: Any) -> int:
    """The bytes of the weights of lama's model that a token reads."""
    from tinygrad.nn.state import get_state_dict

    return sum(t.nbytes() for name, t in get_state_dict(model).items() if "pos_embed" not in name)


def operations(model: Any, length: int) -> float:
    """Operations of a token of a prompt of `length`: products and causal attention in the blocks."""
    c = model.config
    attention = 2 * (c.n_heads + c.n_kv_heads) * c.d_head
    matrices = c.d_model * (attention + (3 if c.gated else 2) * c.d_mlp)
    return 2.0 * c.n_layers * (matrices + c.n_heads * c.d_head * length)


class Lama:
    def __init__(self, weights: str, path: Path, threads: int):
        from tinygrad import Tensor

        from lama.checkpoints import load_model
        from lama.runtime.device import use_device

        use_device("CPU")
        Tensor.empty(1).uop.buffer.ensure_allocated()
        self.base = resident()
        self.use(load_model(path, dtype=None if weights == FILE else weights))

    def use(self, model: Any) -> None:
        from lama.generation import Runner

        self.model = model
        self.runner = Runner(model, context=min(CONTEXT, model.config.context_length))
        self.batches: dict[int, Runner] = {}

    def limits(self, length: int) -> Answer:
        """The bounds of the speed of a token, and of a prompt of `length`; the size of the vocabulary."""
        from tinygrad import dtypes

        from lama.kernels.peak import peak_flops
        from lama.models.quantized import dtype_of

        bits = 8 if dtype_of(self.model) else 32
        if bits == 32 and self.model.embed.weight.dtype == dtypes.bfloat16:
            bits = 16
        found = {"bytes_read": bytes_read(self.model), "operations": operations(self.model, length)}
        found |= {"peak_flops": peak_flops("CPU", bits), "bits": bits}
        return found | {"vocab_size": self.model.config.vocab_size}

    def prefill(self, tokens: list[int]) -> float:
        began = time.perf_counter()
        self.logits = self.runner.prefill(np.array([tokens]))
        return time.perf_counter() - began

    def decode(self, tokens: list[int], n: int) -> tuple[float, list[int]]:
        self.prefill(tokens)
        return timed_tokens(lambda token: self.runner.decode(np.array([token])), self.logits, n)

    def batch(self, tokens: list[int], rows: int, n: int) -> float:
        """Seconds of n tokens in each of some rows, after `tokens`. They are given, as in the peer."""
        from lama.generation import Runner

        if rows not in self.batches:
            self.batches[rows] = Runner(self.model, batch=rows, context=len(tokens) + n)
        runner = self.batches[rows]
        runner.prefill(np.tile(tokens, (rows, 1)))
        given = np.resize(tokens, (n, rows))
        began = time.perf_counter()
        for row in given:
            runner.decode(row)
        return time.perf_counter() - began


class LlamaCpp:
    def __init__(self, weights: str, path: Path, threads: int):
        import llama_cpp

        self.base = resident()
        self.llama = llama_cpp
        llama_cpp.llama_backend_init()
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        file, defaults = str(gguf_file(path, weights)).encode(), llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(file, defaults)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT, 512, 512
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)

    def feed(self, tokens: list[int], position: int) -> np.ndarray:
        """Logits after the last token, (1, vocab_size)."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i == len(tokens) - 1
        if self.llama.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        logits = self.llama.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, (self.vocabulary,))[None]

    def prefill(self, tokens: list[int]) -> float:
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        began = time.perf_counter()
        self.logits = self.feed(tokens, 0)
        return time.perf_counter() - began

    def decode(self, tokens: list[int], n: int) -> tuple[float, list[int]]:
        self.prefill(tokens)
        positions = iter(range(len(tokens), len(tokens) + n))
        return timed_tokens(lambda token: self.feed([token], next(positions)), self.logits, n)


class LlamaTools:
    """llama.cpp's own programs, or those of its fork: each request runs one, which loads the file first."""

    needs = "LLAMA_TOOLS"

    def __init__(self, weights: str, path: Path, threads: int):
        self.file, self.threads = gguf_file(path, weights), threads
        self.tools = Path(os.environ[self.needs])

    def run(self, tool: str, *words: object) -> Answer:
        command = [self.tools / tool, "-m", self.file, "-t", self.threads, *words]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{tool}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
        return json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])

    def prefill(self, tokens: list[int]) -> float:
        found = self.run("llama-bench", "-p", len(tokens), "-n", 0, "-r", 1, "-o", "json")
        return len(tokens) / found["avg_ts"]

    def decode(self, tokens: list[int], n: int) -> tuple[float, list[int]]:
        """Time n tokens from an empty context; llama-bench chooses the tokens."""
        return n / self.run("llama-bench", "-p", 0, "-n", n, "-r", 1, "-o", "json")["avg_ts"], []

    def batch(self, tokens: list[int], rows: int, n: int) -> float:
        words = ["-c", rows * (len(tokens) + n), "-npp", len(tokens), "-ntg", n, "-npl", rows]
        return self.run("llama-batched-bench", *words, "--output-format", "jsonl")["t_tg"]


class IkLlamaTools(LlamaTools):
    needs = "IK_LLAMA_TOOLS"


class OpenVino:
    """OpenVINO GenAI, with a GGUF file. It remembers prompts: no two should begin alike."""

    def __init__(self, weights: str, path: Path, threads: int):
        import openvino_genai

        self.base = resident()
        self.genai = openvino_genai
        self.pipeline = openvino_genai.LLMPipeline(str(path), "CPU", INFERENCE_NUM_THREADS=threads)

    def generate(self, tokens: list[int], n: int) -> Any:
        from openvino import Tensor

        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = n, True, False
        return self.pipeline.generate(Tensor(np.array([tokens], np.int64)), config)

    def prefill(self, tokens: list[int]) -> float:
        return self.generate(tokens, 1).perf_metrics.get_ttft().mean / 1e3

    def decode(self, tokens: list[int], n: int) -> tuple[float, list[int]]:
        """Time n tokens after the first."""
        found = self.generate(tokens, n + 1)
        return n * found.perf_metrics.get_tpot().mean / 1e3, list(found.tokens[0])


class CTranslate2:
    def __init__(self, weights: str, path: Path, threads: int):
        import ctranslate2

        self.base = resident()
        model = ctranslate2_folder(path, weights)
        kind = {"int8": "int8_float32"}.get(weights, weights)
        self.generator = ctranslate2.Generator(
            str(model), device="cpu", compute_type=kind, inter_threads=1, intra_threads=threads
        )
        words = json.loads((model / "vocabulary.json").read_text())
        self.words = list(words)

    def generate(self, tokens: list[int], n: int, rows: int = 1) -> tuple[float, list[int]]:
        words = [self.words[token] for token in tokens]
        began = time.perf_counter()
        found = self.generator.generate_batch(
            [words] * rows,
            max_length=n,
            min_length=n,
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return time.perf_counter() - began, found[0].sequences_ids[0]

    def prefill(self, tokens: list[int]) -> float:
        return self.generate(tokens, 1)[0]

    def decode(self, tokens: list[int], n: int) -> tuple[float, list[int]]:
        """Time n tokens after the first: CTranslate2 has one call for prefill and decoding."""
        first = self.generate(tokens, 1)[0]
        both, found = self.generate(tokens, n + 1)
        return both - first, found

    def batch(self, tokens: list[int], rows: int, n: int) -> float:
        first = self.generate(tokens, 1, rows)[0]
        return self.generate(tokens, n + 1, rows)[0] - first


class Transformers:
    def __init__(self, weights: str, path: Path, threads: int):
        import torch
        import transformers

        self.base = resident()
        self.torch = torch
        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        dtype = getattr(torch, weights)
        self.model = transformers.GPT2LMHeadModel.from_pretrained(path, dtype=dtype).eval()

    def feed(self, tokens: list[int], cache: Any = None) -> Any:
        with self.torch.inference_mode():
            return self.model(
                self.torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1
            )

    def prefill(self, tokens: list[int]) -> float:
        began = time.perf_counter()
        self.out = self.feed(tokens)
        return time.perf_counter() - began

    def decode(self, tokens: list[int], n: int) -> tuple[float, list[int]]:
        self.prefill(tokens)

        def step(token: int) -> np.ndarray:
            self.out = self.feed([token], self.out.past_key_values)
            return self.out.logits[:, -1].float().numpy()

        return timed_tokens(step, self.out.logits[:, -1].float().numpy(), n)


ENGINES: dict[str, Any] = {
    "lama": Lama,
    "llama.cpp": LlamaCpp,
    "llama-batched-bench": LlamaTools,
    "ik_llama.cpp": IkLlamaTools,
    "OpenVINO GenAI": OpenVino,
    "CTranslate2": CTranslate2,
    "transformers": Transformers,
}


def timed_tokens(step: Callable[[int], np.ndarray], logits: np.ndarray, n: int) -> tuple[float, list[int]]:
    """Decode n tokens greedily; returns the seconds and the tokens."""
    tokens = [int(logits.argmax())]
    began = time.perf_counter()
    for _ in range(n):
        tokens.append(int(step(tokens[-1]).argmax()))
    return time.perf_counter() - began, tokens


# --- the peers' files


def gguf_file(folder: Path, weights: str) -> Path:
    """The model in llama.cpp's format; weights F32, F16, Q8_0 or Q4_0, or those of a file."""
    path = folder if weights == FILE else folder / f"{weights}.gguf"
    if path.exists():
        return path
    import gguf
    from safetensors.numpy import load_file

    kind = getattr(gguf.GGMLQuantizationType, weights)
    config = json.loads((folder / "config.json").read_text())
    tensors = {
        name.removeprefix("transformer."): t.astype(np.float32)
        for name, t in load_file(folder / "model.safetensors").items()
    }
    vocabulary = json.loads((folder / "vocab.json").read_text())
    writer = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_name("gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if weights == "F32" else f"MOSTLY_{weights}"))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(vocabulary) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges((folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:])
    writer.add_bos_token_id(len(vocabulary) - 1)
    writer.add_eos_token_id(len(vocabulary) - 1)

    def add(name: str, tensor: np.ndarray, quantised: bool = False) -> None:
        if quantised and weights != "F32":
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(tensor), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor))

    add("token_embd.weight", tensors["wte.weight"], True)
    add("position_embd.weight", tensors["wpe.weight"])
    for i in range(config["n_layer"]):
        for theirs, ours in GGUF_LAYER.items():
            weight = tensors[f"h.{i}.{ours}.weight"]
            add(f"blk.{i}.{theirs}.weight", weight.T, quantised=weight.ndim == 2)
            add(f"blk.{i}.{theirs}.bias", tensors[f"h.{i}.{ours}.bias"])
    add("output_norm.weight", tensors["ln_f.weight"])
    add("output_norm.bias", tensors["ln_f.bias"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GGUF_LAYER = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}


def ctranslate2_folder(folder: Path, weights: str) -> Path:
    """The model in CTranslate2's format; weights float32 or int8."""
    import ctranslate2

    out = folder / f"ctranslate2-{weights}"
    if not out.exists():
        ctranslate2.converters.TransformersConverter(str(folder)).convert(str(out), quantization=weights)
    return out


CONVERTED = {"llama.cpp": gguf_file, "llama-batched-bench": gguf_file, "CTranslate2": ctranslate2_folder}


def convert(engine: str, weights: str, folder: Path, threads: int) -> None:
    """Write the file that a peer reads, if it does not exist."""
    CONVERTED[engine](folder, weights)


# --- memory and start of a process


def resident(field: str = "VmRSS") -> int:
    """Resident bytes of this process, or the peak with VmHWM; 0 without Linux's /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def start(engine: str, weights: str, path: Path, threads: int) -> None:
    """Load an engine, continue a prompt by one token and exit; timed from outside. lama runs its command."""
    if engine == "lama":
        from lama.cli import main

        words = ["generate", "-m", str(path), "-p", PROMPT, "-n", "1", "--temperature", "0"]
        sys.exit(main([*words, *([] if weights == FILE else ["--dtype", weights])]))
    if engine == "transformers":
        import torch
        from transformers import GPT2LMHeadModel, GPT2TokenizerFast

        torch.set_num_threads(threads)
        tokenizer = GPT2TokenizerFast.from_pretrained(path)
        model = GPT2LMHeadModel.from_pretrained(path, dtype=getattr(torch, weights))
        made = model.generate(
            **tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=1, do_sample=False, pad_token_id=0
        )
        print(tokenizer.decode(made[0]))
        return
    from llama_cpp import Llama

    llama = Llama(str(gguf_file(path, weights)), n_threads=threads, n_threads_batch=threads, verbose=False)
    print(llama(PROMPT, max_tokens=1, temperature=0)["choices"][0]["text"])


def load(engine: str, weights: str, path: Path, threads: int) -> Callable[..., Answer]:
    """The function that answers requests by an engine."""
    if engine in CONVERTED:  # in another process, so that its memory is not counted
        command = [sys.executable, __file__, "convert", engine, weights, path, str(threads)]
        subprocess.run(command, check=True)
    loaded = ENGINES[engine](weights, path, threads)

    def answer(do: str, tokens: Sequence[int] = (), rows: int = 1, n: int = 0) -> Answer:
        match do:
            case "prefill":
                return {"tokens_s": len(tokens) / loaded.prefill(tokens)}
            case "decode":
                seconds, made = loaded.decode(tokens, n)
                return {"tokens_s": n / seconds, "made": made}
            case "batch":
                return {"tokens_s": rows * n / loaded.batch(tokens, rows, n)}
            case "memory":
                return {"bytes": resident("VmHWM") - loaded.base}
            case "limits":
                return loaded.limits(n)
        raise ValueError(f"unknown request: {do}")

    return answer


def serve(engine: str, weights: str, path: Path, threads: int) -> None:
    answer_requests(lambda: load(engine, weights, path, threads))


if __name__ == "__main__":
    _, *arguments = sys.argv
    run = {"start": start, "convert": convert}.get(arguments[0], serve)
    arguments = arguments if run is serve else arguments[1:]
    with contextlib.suppress(BrokenPipeError):
        run(arguments[0], arguments[1], Path(arguments[2]), int(arguments[3]))
