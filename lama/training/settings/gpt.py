"""Settings for training a GPT."""

from dataclasses import dataclass
from typing import ClassVar

from lama.errors import UsageError, quoted
from lama.training.settings.base import CorpusSettings, changed, setting

FINE_TUNING_RATE = 1e-4  # low enough that a trained model does not forget what it has learned
LORA_RATE = 2e-4  # for an adapter; Dettmers et al. 2023 (QLoRA), appendix B.2
LORA_CONTEXT = 256  # tokens in a window for an adapter, by default
DPO_RATE = 1e-6  # Rafailov et al. 2023, appendix B
DPO_LORA_RATE = 1e-5
HELD = ("file", "float32", "float16", "bfloat16", "int8", "int4")


@dataclass(frozen=True)
class RunConfig(CorpusSettings):
    """A run of `lama train`: the text, the model, the training, and the reports."""

    causal: ClassVar[bool] = True

    tokenizer: str = setting("bytes", "bytes, character, gpt2, bpe:SIZE (trained here) or a folder with one")
    initial: str = setting(
        "",
        "a model to start from: a name, a folder or a file; the run then has its shape and tokenizer, "
        f"and learning_rate is {FINE_TUNING_RATE:g} unless given",
    )
    lora: int = setting(
        0,
        "rank of an adapter (LoRA) that is trained instead of the weights of --from; learning_rate is then "
        f"{LORA_RATE:g} and weight_decay 0 unless given; 0: the weights themselves are trained",
        least=0,
        most=4096,
    )
    lora_alpha: float = setting(
        0.0, "the adapter's change is multiplied by this / rank; 0 means 2 x rank", least=0, below=1e6
    )
    lora_on: tuple[str, ...] = setting(
        (), "layers that an adapter changes: q k v out gate up down, or such as blocks.1.*; default all"
    )
    dora: bool = setting(False, "an adapter that also learns the norm of each row of its weights (DoRA)")
    dtype: str = setting("file", "type of the weights under an adapter; file: as in the file", choices=HELD)
    chat: tuple[str, ...] = setting(
        (), "training conversations, JSON lines or Parquet, named as for --corpus; needs --from"
    )
    chat_held_out: tuple[str, ...] = setting((), "held-out conversations; default: the share --validation")
    template: str = setting("", "the chat template: plain, or a file; default the model's own")
    epochs: int = setting(
        0,
        "passes over the conversations, which determine steps; 0: as many as --steps needs, 1 without it",
        least=0,
        most=10_000,
    )
    dpo: float = setting(
        0.0,
        "β of DPO, such as 0.1: learn from pairs in --chat, each with a prompt, chosen and rejected; "
        f"learning_rate is then {DPO_RATE:g}, with lora {DPO_LORA_RATE:g}, unless given; 0: no pairs",
        least=0,
        below=1e3,
    )
    packing: bool = setting(True, "several conversations in a row, which do not see each other")
    separate: bool = setting(False, "documents in a window do not see each other")
    mixture: tuple[str, ...] = setting((), "shares of the corpora in the batches; default: by their lengths")
    bias: bool = setting(False, "biases in linear layers and norms")
    tied: bool = setting(True, "share the token embedding with the unembedding")
    activation: str = setting(
        "gelu_new",
        "the MLP's activation",
        choices=("gelu_new", "gelu", "relu", "silu", "tanh", "quick_gelu", "relu2"),
    )
    gated: bool = setting(False, "an MLP with a gate, as in Llama")
    norm_kind: str = setting("layer", "the norms: LayerNorm or RMSNorm", choices=("layer", "rms"))
    n_kv_heads: int = setting(
        0, "heads of keys and values in each attention; 0: as many as of queries", least=0
    )
    positions: str = setting("learned", "position encoding", choices=("learned", "sinusoidal", "rope"))
    rope_theta: float = setting(10000.0, "θ of rotary positions", least=1.0)
    qk_norm: str = setting("none", "norms of queries and keys", choices=("none", "head", "all", "head_after"))
    initial_weights: str = setting(
        "gpt2",
        "gpt2: N(0, 0.02); width: scaled by a matrix's inputs, with blocks' outputs 0",
        choices=("gpt2", "width"),
    )
    evaluate_every: int = changed(
        "evaluate_every", 250, "steps between evaluations and checkpoints; 0: only at the end"
    )
    evaluation_tokens: int = setting(
        30_000, "held-out tokens of an evaluation; with chat 10,000; 0 means all", least=0
    )
    sample_every: int = setting(0, "steps between samples; 0 means four times a run", least=0)
    record: str = setting("", "a sentence whose attention patterns are recorded, for attention.html")
    record_every: int = setting(0, "steps between two recordings; 0 means 60 times a run", least=0)
    record_heads: tuple[str, ...] = setting((), "heads to record, such as 0.1 1.3; default the first twelve")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora and not self.initial:
            raise UsageError("lora needs a model to adapt; got none. Add --from MODEL")
        if self.lora and self.optimizer != "adamw":
            raise UsageError(f"optimizer must be adamw with lora; got {self.optimizer}. Leave it out")
        for name, default in (("lora_alpha", 0.0), ("lora_on", ()), ("dora", False), ("dtype", "file")):
            if not self.lora and getattr(self, name) != default:
                got = f"got {name}={quoted(getattr(self, name))}"
                raise UsageError(f"{name} must be given with lora, the rank of an adapter; {got}")

    @property
    def evaluation_steps(self) -> int:
        return self.evaluate_every

    @property
    def lora_scale(self) -> float:
        """The factor of an adapter's change."""
        return (self.lora_alpha or 2 * self.lora) / self.lora


SHAPE = (
    *("d_model", "n_layers", "n_heads", "n_kv_heads", "d_mlp", "bias", "tied", "activation", "gated", "norm"),
    *("norm_kind", "positions", "rope_theta", "qk_norm"),
)
MODEL_SETTINGS = ("context_length", *SHAPE)
