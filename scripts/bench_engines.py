"""Engines that bench_cpu.py compares, each behind the same few functions.

    python scripts/bench_engines.py ENGINE WEIGHTS FOLDER THREADS

loads an engine, reads requests from standard input, a JSON object a line, and answers each with another.
`start` or `convert` before these arguments call the functions with these names. The peers' files (GGUF,
CTranslate2) are written to FOLDER on first use.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

NEEDS = {
    "lama": (),
    "llama.cpp": ("llama_cpp", "gguf"),
    "CTranslate2": ("ctranslate2", "transformers", "torch"),
    "transformers": ("transformers", "torch"),
    "PyTorch": ("torch",),
}
PROMPT = "How can entropy be reversed?"


def missing(engine: str) -> list[str]:
    """The engine's packages that are not installed."""
    return [name for name in NEEDS[engine] if importlib.util.find_spec(name) is None]


class Lama:
    def __init__(self, weights: str, folder: Path, threads: int):
        import tinygrad.nn.state
        from tinygrad import Tensor

        from lama.checkpoints import load_model
        from lama.generation import Runner
        from lama.runtime.device import use_device

        use_device("CPU")
        Tensor.empty(1).uop.buffer.ensure_allocated()
        self.base, self.weights = resident(), weights
        self.model = load_model(folder, dtype=weights)
        self.runner = Runner(self.model)
        weights_by_name = tinygrad.nn.state.get_state_dict(self.model)
        read = [t for name, t in weights_by_name.items() if "pos_embed" not in name]
        self.bytes_read = sum(t.nbytes() for t in read)

    def limits(self) -> dict[str, float | None]:
        """Bytes of weights that a token reads, and the peak of all threads in operations a second."""
        from lama.kernels.peak import peak_flops

        peak = peak_flops("CPU", 8 if self.weights.startswith("int") else 32)
        return {"bytes_read": self.bytes_read, "peak_flops": peak}

    def prefill(self, tokens: list[int]) -> float:
        began = time.perf_counter()
        self.logits = self.runner.prefill(np.array([tokens]))
        return time.perf_counter() - began

    def decode(self, tokens: list[int], n: int) -> tuple[float, list[int]]:
        self.prefill(tokens)
        return timed_tokens(lambda token: self.runner.decode(np.array([token])), self.logits, n)


class LlamaCpp:
    def __init__(self, weights: str, folder: Path, threads: int):
        import llama_cpp

        self.base = resident()
        self.llama = llama_cpp
        llama_cpp.llama_backend_init()
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        path, defaults = str(gguf_file(folder, weights)).encode(), llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(path, defaults)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = 1024, 512, 512
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


class CTranslate2:
    def __init__(self, weights: str, folder: Path, threads: int):
        import ctranslate2

        self.base = resident()
        model = ctranslate2_folder(folder, weights)
        kind = {"int8": "int8_float32"}.get(weights, weights)
        self.generator = ctranslate2.Generator(
            str(model), device="cpu", compute_type=kind, inter_threads=1, intra_threads=threads
        )
        words = json.loads((model / "vocabulary.json").read_text())
        self.words = list(words)

    def generate(self, tokens: list[int], n: int) -> tuple[float, list[int]]:
        words = [self.words[token] for token in tokens]
        began = time.perf_counter()
        (found,) = self.generator.generate_batch(
            [words], max_length=n, min_length=n, beam_size=1, sampling_topk=1, include_prompt_in_result=False
        )
        return time.perf_counter() - began, found.sequences_ids[0]

    def prefill(self, tokens: list[int]) -> float:
        return self.generate(tokens, 1)[0]

    def decode(self, tokens: list[int], n: int) -> tuple[float, list[int]]:
        """Time n tokens after the first: CTranslate2 has one call for prefill and decoding."""
        first = self.generate(tokens, 1)[0]
        both, found = self.generate(tokens, n + 1)
        return both - first, found


class Transformers:
    def __init__(self, weights: str, folder: Path, threads: int):
        import torch
        import transformers

        self.base = resident()
        self.torch = torch
        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        dtype = getattr(torch, weights)
        self.model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()

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
    """The model in llama.cpp's format; weights F32, F16, Q8_0 or Q4_0."""
    import gguf
    from safetensors.numpy import load_file

    path = folder / f"{weights}.gguf"
    if path.exists():
        return path
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


CONVERTED = {"llama.cpp": gguf_file, "CTranslate2": ctranslate2_folder}


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


def start(engine: str, weights: str, folder: Path, threads: int) -> None:
    """Load an engine, continue a prompt by one token and exit; timed from outside. lama runs its command."""
    if engine == "lama":
        from lama.cli import main

        words = ["generate", "-m", str(folder), "-p", PROMPT, "-n", "1", "--temperature", "0"]
        sys.exit(main([*words, "--dtype", weights]))
    if engine == "transformers":
        import torch
        from transformers import GPT2LMHeadModel, GPT2TokenizerFast

        torch.set_num_threads(threads)
        tokenizer = GPT2TokenizerFast.from_pretrained(folder)
        model = GPT2LMHeadModel.from_pretrained(folder, dtype=getattr(torch, weights))
        made = model.generate(
            **tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=1, do_sample=False, pad_token_id=0
        )
        print(tokenizer.decode(made[0]))
        return
    from llama_cpp import Llama

    llama = Llama(str(gguf_file(folder, weights)), n_threads=threads, n_threads_batch=threads, verbose=False)
    print(llama(PROMPT, max_tokens=1, temperature=0)["choices"][0]["text"])


def serve(engine: str, weights: str, folder: Path, threads: int) -> None:
    """Answer requests until standard input ends. Output of libraries goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        if engine in CONVERTED:  # in another process, so that its memory is not counted
            command = [sys.executable, __file__, "convert", engine, weights, folder, str(threads)]
            subprocess.run(command, check=True)
        loaded = ENGINES[engine](weights, folder, threads)
        answer(ready=True)
        for line in sys.stdin:
            match json.loads(line):
                case {"do": "prefill", "tokens": tokens}:
                    answer(tokens_s=len(tokens) / loaded.prefill(tokens))
                case {"do": "decode", "tokens": tokens, "n": n}:
                    seconds, made = loaded.decode(tokens, n)
                    answer(tokens_s=n / seconds, made=made)
                case {"do": "memory"}:
                    answer(bytes=resident("VmHWM") - loaded.base)
                case {"do": "limits"}:
                    answer(**loaded.limits())
    except Exception as error:
        lines = str(error).splitlines() or [""]
        answer(error=f"{type(error).__name__}: {lines[0][:150]}")


if __name__ == "__main__":
    _, *arguments = sys.argv
    run = {"start": start, "convert": convert}.get(arguments[0], serve)
    arguments = arguments if run is serve else arguments[1:]
    with contextlib.suppress(BrokenPipeError):
        run(arguments[0], arguments[1], Path(arguments[2]), int(arguments[3]))
