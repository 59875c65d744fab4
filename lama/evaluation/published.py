"""Published results of OpenAI's GPT-2 checkpoints. Protocols differ more than models: never mix them."""

from dataclasses import dataclass

SIZES = ("124M", "355M", "774M", "1558M")


@dataclass(frozen=True)
class Series:
    """Figures of one protocol, accuracies in percent; None where no figure with a source was found."""

    protocol: str
    same: bool
    """True for the protocol of `lama.evaluation.tasks`."""
    figures: dict[str, tuple[float | None, ...]]
    """Figures by metric, one for each of SIZES."""
    source: str


PUBLISHED = {
    "hellaswag": (
        Series(
            "lm-evaluation-harness",
            True,
            {"acc": (28.92, None, None, 40.04), "acc_norm": (31.14, None, None, 50.89)},
            "github.com/karpathy/llm.c, dev/data/hellaswag.py",
        ),
        Series(
            "llm.c: no activity, marks left in, log-likelihood per token",
            False,
            {"acc_norm": (29.45, 37.52, 43.20, 48.89)},
            "github.com/karpathy/llm.c, dev/vislog.ipynb",
        ),
    ),
    "lambada": (
        Series(
            "lm-evaluation-harness",
            True,
            {"acc": (32.56, None, None, 51.21), "perplexity": (40.06, None, None, 10.63)},
            "github.com/EleutherAI/lm-evaluation-harness, issue 2159 (124M); "
            "github.com/EleutherAI/gpt-neo, README.md (1558M)",
        ),
        Series(
            "the GPT-2 paper's, which gives no details: others came near its accuracy with the last token "
            "instead of the last word",
            False,
            {"acc": (45.99, 55.48, 60.12, 63.24), "perplexity": (35.13, 15.60, 10.87, 8.63)},
            "Radford et al. 2019, table 3 (sizes there: 117M, 345M, 762M, 1542M); on its scoring, "
            "lm-evaluation-harness, issue 356",
        ),
    ),
}
