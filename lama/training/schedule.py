"""The learning rate over a run."""

import math

from lama.training.settings.base import TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The learning rate of update `step`, from 0: a linear warm-up, then the config's schedule.

    cosine: half a cosine from the peak to the minimum at the last step. Source: Loshchilov & Hutter 2017,
    section 3. constant: the peak. noam: peak · √(warmup / (step + 1)), where the peak is a setting. Source:
    Vaswani et al. 2017, eq. 3. wsd: the peak, then linear to the minimum at the last step, over the share
    `warmdown` of all steps. Source: Hu et al. 2024 (MiniCPM), section 4; linear: Hägele et al. 2024.
    """
    c = config
    if step < c.warmup:
        return c.learning_rate * (step + 1) / c.warmup
    match c.schedule:
        case "constant":
            return c.learning_rate
        case "noam":
            return c.learning_rate * math.sqrt(max(1, c.warmup) / (step + 1))
        case "wsd":
            height = min(1.0, (c.steps - 1 - step) / max(1, round(c.warmdown * c.steps)))
        case _:
            done = min(1.0, (step - c.warmup) / max(1, c.steps - 1 - c.warmup))
            height = 0.5 * (1 + math.cos(math.pi * done))
    return c.min_learning_rate + (c.learning_rate - c.min_learning_rate) * height
