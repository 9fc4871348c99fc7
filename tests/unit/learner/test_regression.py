"""One full update of each variant under a fixed seed, so that no change of the loss goes unnoticed.

The figures prove nothing by themselves (tests/unit/rl does that): they are what the code gave when it was
proved. Whoever changes them on purpose prints new ones with ``python -m tests.unit.learner.test_regression``
and says in the commit why they moved.
"""

from __future__ import annotations

import functools

import pytest

from tests.unit.learner.variants import VARIANTS, Variant

# loss_total, loss_policy, loss_baseline, loss_entropy, grad_norm, how far the weights have moved
FIGURES: dict[str, tuple[float, ...]] = {
    "shallow": (12.08122, 3.28382, 9.123694, -0.326294, 48.41159, 132.0761),
    "nature": (12.15577, 4.483041, 7.991051, -0.3183271, 53.72006, 195.5658),
    "deep": (19.40586, 5.157238, 14.42361, -0.1749869, 512.1481, 365.5409),
    "mlp": (41.21555, 30.2921, 11.25692, -0.3334763, 48.37061, 12.1955),
    "lstm": (16.90838, 9.292386, 7.961822, -0.3458257, 18.4884, 117.2797),
    "deep-lstm-instructions": (13.8684, 6.426095, 7.765674, -0.3233664, 55.83916, 390.1859),
    "mean": (0.6634703, 0.342659, 0.3367051, -0.0158938, 1.453162, 16.10915),
    "unlike-bars": (204.8567, 40.31343, 164.8808, -0.3375324, 143.0876, 135.4773),
    "lambda": (92.75961, 52.59925, 40.49717, -0.3368102, 140.7293, 132.4425),
    "rmsprop-momentum": (12.08122, 3.283819, 9.123694, -0.326294, 48.41159, 171.3944),
    "rmsprop-tf": (14.84633, 7.839602, 7.357553, -0.350821, 31.02829, 4.063139),
    "adam": (14.73095, 7.716818, 7.364104, -0.3499756, 31.9054, 69.21016),
    "tasks": (16.88868, 8.861954, 8.358221, -0.3314994, 42.9892, 132.9391),
    "popart-tasks": (81.72247, 20.31412, 61.75364, -0.3452827, 123.5915, 152.919),
    "replay": (0.9385833, -0.1383018, 1.154578, -0.07769245, 21.04757, 71.71378),
    "replay-unbounded": (12.32646, 3.275552, 9.125594, -0.07468653, 48.66908, 133.2099),
    "replay-stored": (17.17367, 9.290154, 7.962136, -0.07861914, 18.53094, 118.3916),
    "replay-recomputed": (19.42393, 12.25035, 7.252434, -0.07885017, 17.38841, 112.773),
}


@functools.cache
def figures_of(name: str) -> tuple[float, ...]:
    """Two updates: the second one sees what the first did to the optimiser and the statistics."""
    variant = Variant(name)
    trainer = variant.make_trainer()
    before = {key: tensor.clone() for key, tensor in trainer.network.state_dict().items()}
    for _ in range(2):
        trainer.update(variant.make_batch())
    figures = trainer.read_figures()
    after = trainer.network.state_dict()
    moved = sum((after[key] - before[key]).double().abs().sum().item() for key in before)
    return (
        figures.loss_total,
        figures.loss_policy,
        figures.loss_baseline,
        figures.loss_entropy,
        figures.grad_norm,
        moved,
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_an_update_is_what_it_was(name: str) -> None:
    assert figures_of(name) == pytest.approx(FIGURES[name], rel=1e-4)


def test_no_two_variants_are_the_same_update() -> None:
    """A switch that switches nothing would go unnoticed."""
    distinct = {tuple(float(f"{figure:.4g}") for figure in figures_of(name)) for name in VARIANTS}
    assert len(distinct) == len(VARIANTS)


if __name__ == "__main__":
    for each in VARIANTS:
        print(f"    {each!r}: ({', '.join(f'{figure:.7g}' for figure in figures_of(each))}),")  # noqa: T201
