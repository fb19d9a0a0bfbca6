"""Which learning rate has a step? Linear warm-up, then a cosine from the peak to the end."""

from __future__ import annotations

import math

from concertina.config import TrainingConfig

__all__ = ["learning_rate"]


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Rate of optimizer step `step`, counted from 1; after the last step it stays at the end of the cosine."""
    peak, end = training.learning_rate, training.min_learning_rate
    if step <= training.warmup_steps:
        return peak * step / training.warmup_steps
    span = max(1, training.steps - training.warmup_steps)
    done = min(1.0, (step - training.warmup_steps) / span)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * done))
