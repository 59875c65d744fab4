"""Published roles of heads of GPT-2 small (124M), to compare with the scores of `lama heads -m gpt2`."""

from dataclasses import dataclass, replace

from lama.models.gpt import GPT, GPT2_CONFIGS


@dataclass(frozen=True)
class KnownHeads:
    """Heads (layer, head) with a published role."""

    role: str
    heads: tuple[tuple[int, int], ...]
    source: str
    scores: tuple[float, ...] = ()
    """Published scores in the order of the heads, if any."""


IOI = (
    'Wang et al. 2022, "Interpretability in the Wild" (indirect objects); '
    "github.com/redwoodresearch/Easy-Transformer"
)
GPT2_SMALL = (
    KnownHeads(
        "induction",
        ((5, 5), (6, 9), (7, 10), (5, 1), (7, 2)),
        "github.com/designer-coderajay/induction-head-detector, 50 random tokens twice",
        (0.932, 0.913, 0.910, 0.908, 0.833),
    ),
    KnownHeads("induction", ((5, 5), (5, 8), (5, 9), (6, 9)), IOI),
    KnownHeads(
        "previous token",
        ((4, 11), (2, 2)),
        "TransformerLens, Head_Detector_Demo: 4.11 nearly always, 2.2 in part",
    ),
    KnownHeads("previous token", ((2, 2), (4, 11)), IOI),
    KnownHeads("duplicate token", ((0, 1), (0, 10), (3, 0)), IOI),
    KnownHeads("name mover", ((9, 9), (10, 0), (9, 6)), IOI),
    KnownHeads(
        "backup name mover", ((10, 10), (10, 6), (10, 2), (10, 1), (11, 2), (9, 7), (9, 0), (11, 9)), IOI
    ),
    KnownHeads("negative name mover", ((10, 7), (11, 10)), IOI),
    KnownHeads("S-inhibition", ((7, 3), (7, 9), (8, 6), (8, 10)), IOI),
)


def known_heads(name: str, model: GPT) -> tuple[KnownHeads, ...]:
    """Published heads of the model with this name, if it also has that model's shape; else none."""
    same = name == "gpt2" and replace(model.config, end_tokens=()) == GPT2_CONFIGS["gpt2"]
    return GPT2_SMALL if same else ()
