"""The section of a recipe that says what `bkn compare` varies."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bkn_core.kinds import Kind
from bkn_core.recipe_sections import Count, Positive, Section, Text

Norms = Annotated[tuple[Kind, ...], Field(strict=False, min_length=1, description="a list of kinds, such as [bn, bkn]")]
Sizes = Annotated[
    Annotated[tuple[Count, ...], Field(strict=False, min_length=1)] | None,
    Field(description="a list of integers from 1 up, or null"),
]
Names = Annotated[
    Annotated[tuple[Text, ...], Field(strict=False, min_length=1)] | None,
    Field(description="a list of names, or null for the recipe's model.name"),
]
Rates = Annotated[
    Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] | None,
    Field(description="a list of finite numbers above 0, or null for the recipe's optim.lr"),
]
Power = Annotated[float, Field(ge=0, le=1, description="a number from 0 to 1")]


class CompareConfig(Section):
    """What `bkn compare` varies where its options do not say; training knows nothing of it.

    The learning rate of g images a step is that of the recipe times (g / batch.gradient)^learning_rate_power.
    """

    norms: Norms = Field(default=("bn", "bkn"), title="kinds of normalization")
    statistics_batch_sizes: Sizes = Field(
        default=None, title="images that share statistics; null: 2 and the gradient batch size"
    )
    gradient_batch_sizes: Sizes = Field(default=None, title="images of one optimizer step; null: batch.gradient")
    models: Names = Field(default=None, title="networks")
    learning_rates: Rates = Field(default=None, title="highest learning rates, chosen from on validation images")
    learning_rate_power: Power = Field(
        default=0.0, title="how learning rates follow g: 0 not at all, 0.5 as its root, 1 in proportion"
    )
    seeds: Count = Field(default=1, title="runs of each, with seeds from train.seed upwards")
