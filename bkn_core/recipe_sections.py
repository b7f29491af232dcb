"""The sections of a recipe: every key with its type and default, and the rules that hold within a section."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

# The description of a type is what an error message says is allowed.
Count = Annotated[int, Field(ge=1, description="an integer of at least 1")]
Limit = Annotated[Count | None, Field(description="an integer of at least 1, or null for all")]
Pair = Annotated[tuple[Count, Count], Field(strict=False)]  # not strict: YAML has lists in place of tuples
Size = Annotated[Count | Pair | None, Field(description="an integer of at least 1, [height, width] or null")]
Seed = Annotated[int, Field(ge=0, lt=2**32, description="an integer from 0 to 4294967295")]
Flag = Annotated[bool, Field(description="true or false")]
FlagOrAuto = Annotated[Literal["auto"] | bool, Field(description="auto, true or false")]
Positive = Annotated[float, Field(gt=0, description="a finite number above 0")]
PositiveOrNone = Annotated[Positive | None, Field(description="a finite number above 0, or null for none")]
PositiveOrOwn = Annotated[Positive | None, Field(description="a finite number above 0, or null for the network's own")]
NonNegative = Annotated[float, Field(ge=0, description="a finite number of at least 0")]
FractionOrOwn = Annotated[
    Annotated[float, Field(ge=0, le=1)] | None,
    Field(description="a number from 0 to 1, or null for the network's own"),
]
BelowOne = Annotated[float, Field(ge=0, lt=1, description="a number of at least 0 and below 1")]
InsideOne = Annotated[float, Field(gt=0, lt=1)]
Decay = Annotated[InsideOne | None, Field(description="a number above 0 and below 1, or null for none")]
Gain = Annotated[Literal["auto"] | Annotated[float, Field(gt=0, le=1)], Field(description="auto or a number in (0, 1]")]
Text = Annotated[str, Field(pattern=r"^\P{Cc}+$", description="text (in quotes where it looks like a number)")]
ShareOrFolder = Annotated[
    InsideOne | Text | None,
    Field(description="a share of the training images above 0 and below 1, the path of a folder of CLASS/*, or null"),
]
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]{0,99}$", description="letters, digits and any of _ . -")]
Device = Annotated[str, Field(pattern="^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$", description="auto, cpu, mps or cuda[:N]")]
ArgumentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Plain = bool | int | float | str | None
Arguments = Annotated[dict[ArgumentName, Plain], Field(description="a mapping of argument names to plain values")]
Counts = Annotated[tuple[Count, ...], Field(strict=False, min_length=1, description="a list of integers from 1 up")]
Fractions = Annotated[tuple[InsideOne, ...], Field(strict=False, description="a list of numbers inside (0, 1)")]

Kind = Literal[
    "bkn",
    "bn",
    "brn",
    "gn",
    "ln",
    "in",
    "fixed",
    "none",
    "gn_ws",
    "mabn",
    "online",
    "frn",
    "evonorm",
    "frozen",
    "reference",
    "iternorm",
    "gkn",
    "normprop",
    "cbn",
]


class Section(BaseModel):
    """A part of the recipe: frozen, no other keys, and no flag, text or rounding in place of a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The network before its norm layers are converted."""

    name: Text = "cifar_resnet8"
    pretrained: Flag = False
    args: Arguments = {}


class NormConfig(Section):
    """The kind of norm layer and the filter inside it; null leaves the network its own `eps` and `momentum`."""

    kind: Kind = "bkn"
    transition: Literal["learned", "network"] = "network"
    message: Literal["normalized", "raw"] = "normalized"
    covariance: Literal["diagonal", "full"] = "diagonal"
    gain: Gain = "auto"
    learn_gain: Flag = True
    gain_schedule: Literal["constant", "anneal"] = "anneal"
    correction: Flag = False
    innovation: Flag = True
    input_prior: Flag = True
    eps: PositiveOrOwn = None
    momentum: FractionOrOwn = None

    @model_validator(mode="after")
    def _learned_gain_is_below_one(self) -> Self:
        # A learned gain is a sigmoid, which reaches 1 nowhere.
        if self.kind == "bkn" and self.learn_gain and self.gain == 1:
            raise ValueError("norm.gain is 1.0; norm.learn_gain true needs a number below 1 with norm.kind bkn")
        return self


class BatchConfig(Section):
    """The paper's (g, s), and the images of one forward pass of one process."""

    gradient: Count = 128
    statistics: Count = 2
    per_device: Count = Field(default=None, validate_default=True)

    @field_validator("per_device", mode="before")
    @classmethod
    def _largest_whole_size(cls, value: object, info: ValidationInfo) -> object:
        """Null is the largest size up to 128 that makes whole groups and whole gradient batches."""
        if value is not None:
            return value
        gradient, statistics = info.data.get("gradient", 1), info.data.get("statistics", 1)
        whole = (size for size in range(min(gradient, 128), 0, -1) if gradient % size == 0 == size % statistics)
        return next(whole, statistics)

    @model_validator(mode="after")
    def _batches_are_whole_multiples(self) -> Self:
        multiple = f"give a multiple of batch.statistics ({self.statistics})"
        if self.gradient % self.statistics:
            raise ValueError(f"batch.gradient is {self.gradient}; {multiple}")
        if self.per_device % self.statistics or self.gradient % self.per_device:
            divides = f"that divides batch.gradient ({self.gradient})"
            raise ValueError(f"batch.per_device is {self.per_device}; {multiple} {divides}")
        return self


class DataConfig(Section):
    """The images and what is done to them.

    `validation` images are those that epochs are compared on, in place of the test images: a share, drawn from all
    training images in proportion to the classes, or a folder of their own. `train_images` counts what is left.
    """

    name: Text = "digits"
    root: Text = "data"
    image_size: Size = None
    train_images: Limit = None
    test_images: Limit = None
    validation: ShareOrFolder = None
    augment: Literal["none", "flip", "crop_flip"] = "none"
    download: Flag = False

    @model_validator(mode="before")
    @classmethod
    def _enlarge_digits(cls, values: Any) -> Any:
        # The scans are 8x8, small for three stages of convolutions; an image_size of null keeps them so.
        digits = isinstance(values, dict) and values.get("name", "digits") == "digits"
        return {"image_size": 16, **values} if digits else values


class TrainConfig(Section):
    """How long, where and how carefully."""

    epochs: Count = 10
    seed: Seed = 0
    device: Device = "auto"
    amp: FlagOrAuto = "auto"
    compile: Flag = False
    channels_last: Flag = True
    ema: Decay = None
    clip_norm: PositiveOrNone = None
    deterministic: Flag = False
    nonfinite: Literal["stop", "skip"] = "stop"


class OptimConfig(Section):
    """The optimizer and its schedule; warmup and milestones are fractions of the steps."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.1
    momentum: BelowOne = 0.9
    nesterov: Flag = True
    weight_decay: NonNegative = 5e-4
    norm_weight_decay: NonNegative = 0.0
    gain_lr_scale: NonNegative = 1.0
    schedule: Literal["onecycle", "cosine", "multistep", "constant"] = "onecycle"
    warmup: BelowOne = 0.2
    milestones: Fractions = (0.5, 0.75)
    gamma: Positive = 0.1

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("optim.momentum is 0.0; optim.nesterov true needs a number above 0 with optim.name sgd")
        return self


class EvalConfig(Section):
    """How a model is measured."""

    batch_size: Count = 250
    stats: Literal["auto", "population", "batch", "both"] = "auto"
    topk: Counts = (1, 5)


class LogConfig(Section):
    """What a run writes down beside its metrics."""

    every: Count = 20
    tensorboard: Flag = False
    plots: Flag = True
