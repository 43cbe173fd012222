"""Interleaved runs: subjects in turn, in another order each round, so drift affects all alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from bench.load import Figures, Load
from bench.namespaces import SubjectPair

Say = Callable[[str], None]


def interleaved(
    loads: Sequence[Load],
    pairs: Sequence[SubjectPair],
    rounds: int,
    seconds: float,
    order: random.Random,
    say: Say,
    enough: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, list[float]]]:
    """Case to subject to one figure per round. No further round begins once `enough` is true."""
    samples: dict[str, dict[str, list[float]]] = {}

    def keep(subject: str, figures: Figures) -> None:
        for case, figure in figures.items():
            samples.setdefault(case, {}).setdefault(subject, []).append(figure)

    for number in range(rounds):
        if number and enough():
            say(f"the time is used up after {number} of {rounds} rounds")
            break
        for load in loads:
            for pair in order.sample(list(pairs), len(pairs)):
                figures = load.run(pair, seconds)
                keep(pair.subject, figures)
                told = ", ".join(f"{case} {figure:.5g}" for case, figure in figures.items())
                say(f"round {number + 1}/{rounds}  {pair.subject:<8} {told}")
    return samples
