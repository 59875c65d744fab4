"""What others found of the heads of GPT-2 small (124M): to hold beside what `lama heads gpt2` measures."""

from dataclasses import dataclass, replace

from lama.models.gpt import GPT, GPT2_CONFIGS


@dataclass(frozen=True)
class KnownHeads:
    """Heads (layer, head) that were said to have a role."""

    role: str
    heads: tuple[tuple[int, int], ...]
    source: str
    scores: tuple[float, ...] = ()
    """Published, in the order of the heads, where they are."""


IOI = 'Wang et al. 2022, "Interpretability in the Wild" (indirect objects); github.com/redwoodresearch/Easy-Transformer'
GPT2_SMALL = (
    KnownHeads(
        "induction",
        ((5, 5), (6, 9), (7, 10), (5, 1), (7, 2)),
        "github.com/designer-coderajay/induction-head-detector, 50 random tokens twice",
        (0.932, 0.913, 0.910, 0.908, 0.833),
    ),
    KnownHeads("induction", ((5, 5), (5, 8), (5, 9), (6, 9)), IOI),
    KnownHeads("previous token", ((4, 11), (2, 2)), "TransformerLens, Head_Detector_Demo: 4.11 nearly always, 2.2 in part"),
    KnownHeads("previous token", ((2, 2), (4, 11)), IOI),
    KnownHeads("duplicate token", ((0, 1), (0, 10), (3, 0)), IOI),
    KnownHeads("name mover", ((9, 9), (10, 0), (9, 6)), IOI),
    KnownHeads("backup name mover", ((10, 10), (10, 6), (10, 2), (10, 1), (11, 2), (9, 7), (9, 0), (11, 9)), IOI),
    KnownHeads("negative name mover", ((10, 7), (11, 10)), IOI),
    KnownHeads("S-inhibition", ((7, 3), (7, 9), (8, 6), (8, 10)), IOI),
)


def known_heads(name: str, model: GPT) -> tuple[KnownHeads, ...]:
    """What is known of a model that goes by this name, and has the shape of the one so called; else nothing."""
    return GPT2_SMALL if name == "gpt2" and replace(model.config, end_tokens=()) == GPT2_CONFIGS["gpt2"] else ()
