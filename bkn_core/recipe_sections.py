"""The sections of a recipe: every key with its type and default, and the rules that hold within a section."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from bkn_core.kinds import Kind

# The description of a type is what an error message says is allowed; the title of a key is what it means.
Count = Annotated[int, Field(ge=1, description="an integer of at least 1")]
Limit = Annotated[Count | None, Field(description="an integer of at least 1, or null for all")]
Pair = Annotated[tuple[Count, Count], Field(strict=False)]  # not strict: YAML has lists in place of tuples
Size = Annotated[Count | Pair | None, Field(description="an integer of at least 1, [height, width] or null")]
CountOrNone = Annotated[Count | None, Field(description="an integer of at least 1, or null for none")]
Workers = Annotated[
    Annotated[int, Field(ge=1, le=64)] | None, Field(description="an integer from 1 to 64, or null for 2")
]
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
Alpha = Annotated[
    Annotated[float, Field(ge=0.01, le=100)] | None, Field(description="a number from 0.01 to 100, or null for none")
]
Magnitude = Annotated[
    Annotated[int, Field(ge=0, le=30)] | None, Field(description="an integer from 0 to 30, or null for none")
]
Weights = Annotated[
    Literal["balanced"]
    | Annotated[tuple[Annotated[float, Field(ge=1e-6, le=1e6)], ...], Field(strict=False, min_length=1)]
    | None,
    Field(description="balanced, a list of one number from 0.000001 to 1000000 for each class, or null for none"),
]
Scale = Annotated[
    Annotated[tuple[Positive, Positive], Field(strict=False)] | None,
    Field(description="[smallest, largest], or null for none"),
]
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


class Section(BaseModel):
    """A part of the recipe: frozen, no other keys, and no flag, text or rounding in place of a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The network before its norm layers are converted."""

    name: Text = Field(
        default="cifar_resnet8",
        title="cifar_plain, cifar_resnetN, cifar_preact_resnetN, inception_v2, unet, torchvision's, timm:NAME",
    )
    pretrained: Flag = Field(default=False, title="begin with the published weights of torchvision or timm")
    args: Arguments = Field(default={}, title="arguments of the network, such as model.args.width=32")


class NormConfig(Section):
    """The kind of norm layer and the filter inside it; null leaves the network its own `eps` and `momentum`."""

    kind: Kind = Field(
        default="bkn", title="how layers normalize: Batch Kalman, batch, group ...; all in docs/rivals.md"
    )
    transition: Literal["learned", "network"] = Field(
        default="network", title="what predicts a layer: the network's own weights, or a learned linear map"
    )
    message: Literal["normalized", "raw"] = Field(
        default="normalized", title="what a layer hands on: moments of its normalized or of its raw output"
    )
    covariance: Literal["diagonal", "full"] = Field(
        default="diagonal", title="variance per channel, or covariances between channels"
    )
    gain: Gain = Field(
        default="auto", title="share of what a group shows in the blend with its prior; auto: computed in training"
    )
    learn_gain: Flag = Field(default=True, title="learn a gain that is a number")
    gain_schedule: Literal["constant", "anneal"] = Field(
        default="anneal", title="let the gain fall to 0 in the second half of training, or keep it"
    )
    correction: Flag = Field(default=False, title="learn a correction of each prior")
    innovation: Flag = Field(default=True, title="correct each prior by how far it was off in the steps before")
    input_prior: Flag = Field(default=True, title="measure the moments of input patches for the first layer's prior")
    weights: Literal["plain", "centred"] = Field(
        default="plain", title="keep the weights of layers before norm layers at a mean of 0, or leave them free"
    )
    eps: PositiveOrOwn = Field(default=None, title="added to every variance")
    momentum: FractionOrOwn = Field(default=None, title="weight of the newest statistics in the moving ones")

    @model_validator(mode="after")
    def _learned_gain_is_below_one(self) -> Self:
        # A learned gain is a sigmoid, which reaches 1 nowhere.
        if self.kind == "bkn" and self.learn_gain and self.gain == 1:
            raise ValueError("norm.gain is 1.0; norm.learn_gain true needs a number below 1 with norm.kind bkn")
        return self


class BatchConfig(Section):
    """The paper's (g, s), and the images of one forward pass of one process."""

    gradient: Count = Field(default=128, title="g: images of one optimizer step, over all passes and processes")
    statistics: Count = Field(default=2, title="s: images that share statistics")
    per_device: Count = Field(
        default=None,
        validate_default=True,
        title="images of one forward pass of one process; null: the largest that fits, up to 128",
    )

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
        if self.per_device % self.statistics:
            raise ValueError(f"batch.per_device is {self.per_device}; {multiple}")
        if self.gradient % self.per_device:
            divides = f"that divides batch.gradient ({self.gradient})"
            raise ValueError(f"batch.per_device is {self.per_device}; {multiple} {divides}")
        return self


# What of the data sets is read from a file or folder of the user's; the others are torchvision's.
MASK_DATA = ("scenes", "maskfolder")
OWN_DATA = ("digits", "imagefolder", "npz", *MASK_DATA)


class DataConfig(Section):
    """The images and what is done to them.

    `validation` images are those that epochs are compared on, in place of the test images: a share, drawn from all
    training images in proportion to the classes, or a folder of their own. `train_images` counts what is left. Without
    `name` the data is what `root` is: an .npz, else a folder or zip of pictures; without both, the digits.
    Pictures of another aspect than `image_size` are stretched, or keep theirs (`resize`): `crop` cuts off what is too
    long evenly on both sides, `pad` adds black there; a model takes along which.
    Training images are flipped and shifted (`augment`), then changed by two drawn operations (`rand_augment`), then
    mixed with each other within a forward (`mixup`, `cutmix`; with both, one of them is drawn for each forward).
    """

    name: Text = Field(
        default="digits", title="digits, npz, imagefolder, a classification set of torchvision, scenes, maskfolder"
    )
    root: Text = Field(default="data", title="folder or file of the images")
    image_size: Size = Field(
        default=None, title="size of images after resizing, null: their own; digits have 16 by default"
    )
    resize: Literal["stretch", "crop", "pad"] = Field(
        default="stretch", title="how pictures of another aspect fit into image_size"
    )
    train_images: Limit = Field(default=None, title="how many training images are used")
    test_images: Limit = Field(default=None, title="how many test images are used")
    validation: ShareOrFolder = Field(
        default=None, title="images that epochs are compared on: a share of the training images, or a folder"
    )
    augment: Literal["none", "flip", "crop_flip"] = Field(default="none", title="random changes of training images")
    scale: Scale = Field(default=None, title="factor by which training images and masks are resized, drawn")
    jitter: BelowOne = Field(default=0.0, title="random changes of brightness, contrast and saturation with masks")
    rand_augment: Magnitude = Field(default=None, title="magnitude of two drawn operations on each training image")
    mixup: Alpha = Field(default=None, title="alpha of MixUp within a forward")
    cutmix: Alpha = Field(default=None, title="alpha of CutMix within a forward")
    download: Flag = Field(default=False, title="download a set of torchvision into data.root")

    @model_validator(mode="before")
    @classmethod
    def _enlarge_digits(cls, values: Any) -> Any:
        values = _kind_of_the_root(values)
        # The scans are 8x8, small for three stages of convolutions; an image_size of null keeps them so.
        digits = isinstance(values, dict) and values.get("name", "digits") == "digits"
        return {"image_size": 16, **values} if digits else values

    @model_validator(mode="after")
    def _every_key_decides_something(self) -> Self:
        # The root of digits is "data" where no other was given, as in recipes of earlier versions.
        if self.name in ("digits", "scenes") and self.root != "data":
            raise ValueError(
                f"data.root is {self.root!r}, but data.name is {self.name}, which is built in and reads none; "
                "leave data.name out, or give imagefolder, npz, maskfolder or a set of torchvision"
            )
        if self.download and self.name in OWN_DATA:
            raise ValueError(f"data.download is true, but data.name is {self.name}, which is not downloaded")
        return self


def _kind_of_the_root(values: Any) -> Any:
    """The values of a data section with the name that its root gives it, where it has none."""
    if not isinstance(values, dict) or "name" in values or "root" not in values:
        return values
    return {**values, "name": "npz" if str(values["root"]).lower().endswith(".npz") else "imagefolder"}


class TrainConfig(Section):
    """How long, where and how carefully.

    `label_smoothing` moves this share of each label to all classes evenly. `class_weights` weigh the loss of a label's
    class; they are scaled to 1 on average over the training images. Evaluation knows neither.
    `patience` ends a run when so many epochs in a row were no better on the validation images; the schedules stay
    those of all `epochs`. `workers` threads decode the pictures of a folder or zip file; how many changes no result.
    """

    epochs: Count = Field(default=10, title="passes over the training images")
    seed: Seed = Field(default=0, title="of weights, order of images and augmentation")
    device: Device = Field(default="auto", title="where to compute")
    amp: FlagOrAuto = Field(default="auto", title="mixed precision; auto: on CUDA only")
    compile: Flag = Field(default=False, title="compile the model with torch.compile")
    channels_last: Flag = Field(default=True, title="keep images with their channels last in memory")
    ema: Decay = Field(default=None, title="decay of a moving average of the weights, which is measured and saved")
    clip_norm: PositiveOrNone = Field(default=None, title="largest norm of the gradient")
    label_smoothing: BelowOne = Field(default=0.0, title="share of each label that all classes get evenly")
    loss: Literal["cross_entropy", "dice", "cross_entropy_dice"] = Field(
        default="cross_entropy", title="loss over the pixels of masks: cross entropy, Dice, or their sum"
    )
    class_weights: Weights = Field(default=None, title="weight of the loss of each class, 1 on average")
    patience: CountOrNone = Field(
        default=None, title="epochs without a better validation accuracy after which the run ends"
    )
    workers: Workers = Field(default=None, title="threads that decode pictures; null: 2")
    deterministic: Flag = Field(default=False, title="use deterministic operations only")
    nonfinite: Literal["stop", "skip"] = Field(default="stop", title="what to do with a step that is not finite")


class OptimConfig(Section):
    """The optimizer and its schedule; warmup and milestones are fractions of the steps."""

    name: Literal["sgd", "adamw"] = Field(default="sgd", title="the optimizer")
    lr: Positive = Field(default=0.1, title="the highest learning rate")
    momentum: BelowOne = Field(default=0.9, title="of sgd; the first beta of adamw")
    nesterov: Flag = Field(default=True, title="Nesterov momentum of sgd")
    weight_decay: NonNegative = Field(default=5e-4, title="of weights of convolutions and linear layers")
    norm_weight_decay: NonNegative = Field(
        default=0.0, title="of scales and shifts of normalization layers and of biases"
    )
    gain_lr_scale: NonNegative = Field(default=1.0, title="factor of the learning rate of learned gains")
    schedule: Literal["onecycle", "cosine", "multistep", "constant"] = Field(
        default="onecycle", title="course of the learning rate"
    )
    warmup: BelowOne = Field(default=0.2, title="share of the steps in which the learning rate rises")
    milestones: Fractions = Field(
        default=(0.5, 0.75), title="shares of the steps at which the learning rate falls (multistep)"
    )
    gamma: Positive = Field(default=0.1, title="factor of the learning rate at each milestone")

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("optim.momentum is 0.0; optim.nesterov true needs a number above 0 with optim.name sgd")
        return self


class EvalConfig(Section):
    """How a model is measured."""

    batch_size: Count = Field(default=250, title="images of one forward pass when measuring")
    stats: Literal["auto", "population", "batch", "both"] = Field(
        default="auto",
        title="statistics of measuring: moving ones, each image by itself, or both; auto: batch where s is 1",
    )
    topk: Counts = Field(default=(1, 5), title="k of the top-k accuracies")


class LogConfig(Section):
    """What a run writes down beside its metrics."""

    every: Count = Field(default=20, title="steps between two rows of metrics.jsonl")
    tensorboard: Flag = Field(default=False, title="write TensorBoard events at the end")
    plots: Flag = Field(default=True, title="draw the curves at the end")
