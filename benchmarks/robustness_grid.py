"""Which trainings robustness.py runs: the settings of one, the forms of the suite, filters, expected times."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

from robustness_data import NAMES, VERSION, is_segmentation
from robustness_networks import CLASSIFIERS, SEGMENTER

PLACES = ((128, 2), (128, 1), (8, 2), (8, 1), (2, 2), (2, 1), (1, 1))  # images per step, images per group
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
OPTIMIZERS = ("sgd", "adamw")
NORMS = ("bn", "bkn", "gn", "in")
RATES = {"sgd": {128: 0.1, 8: 0.02, 2: 0.005, 1: 0.0025}, "adamw": dict.fromkeys((128, 8, 2, 1), 0.002)}
FORMS = ("quick", "day", "full")

# Images seen in training, by the images per step; a scene counts for several images.
IMAGES = {
    "quick": {128: 12_800, 8: 4_000, 2: 2_000, 1: 1_000},
    "day": {128: 40_000, 8: 24_000, 2: 12_000, 1: 8_000},
}
SCENES_FOR = 4  # images

# Seconds on one core: of a step, of a training image beside it, of an image in one evaluation.
SECONDS = {
    "cifar_plain": (0.004, 0.0012, 0.0004),
    "cifar_resnet8": (0.006, 0.0011, 0.0004),
    "cifar_resnet20": (0.012, 0.0024, 0.0008),
    "cifar_preact_resnet14": (0.010, 0.0018, 0.0006),
    "mobile": (0.008, 0.0012, 0.0004),
    "unet": (0.012, 0.0200, 0.0070),
}
AREA = {"cifar": 1.0, "glyphs": 3.0, "digits": 3.0, "textures": 2.2, "scenes": 1.0}  # times of a 16×16 image


@dataclasses.dataclass(frozen=True)
class Settings:
    """One training.

    Args:
        data: an image set of robustness_data.
        network: a network of robustness_networks.
        optimizer: "sgd" or "adamw".
        g: images per step.
        s: images per statistics group; g where the norm is not "bkn".
        norm: "bn", "bkn", "gn" or "in".
        factor: of the usual learning rate for g.
        seed: of weights and the order of images.
        images: seen in training.
        part: "validation" or "test": the images that are scored.
        version: of the image sets.
        weights: "plain" or "centred", those that norm layers read.
    """

    data: str
    network: str
    optimizer: str
    g: int
    s: int
    norm: str
    factor: float = 1.0
    seed: int = 0
    images: int = 1_000
    part: str = "validation"
    version: int = VERSION
    weights: str = "plain"

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return max(1, self.images // self.g)

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return RATES[self.optimizer][self.g] * self.factor

    @property
    def key(self) -> str:
        """A name of these settings and no others, for people and files."""
        named = dataclasses.asdict(self)
        if self.weights == "plain":
            del named["weights"]  # as files have it that know no others
        return ",".join(f"{name}={value}" for name, value in named.items())

    @property
    def seconds(self) -> float:
        """Expected time on one core."""
        step, image, evaluation = SECONDS[self.network]
        area = AREA[self.data.partition("-")[0]]
        scored = (400 if is_segmentation(self.data) else 2_000) * (2 if self.norm == "bkn" else 1)
        return self.steps * step + area * (self.images * image + scored * evaluation)


def grid(
    form: str, *, seeds: int = 1, part: str = "validation", images: int | None = None, weights: str = "plain"
) -> list[Settings]:
    """List the trainings of a form, each once; seeds follow each other so that whole seeds finish first.

    Args:
        form: "quick", "day", or "full": everything, at the length of "day", to be filtered.
        seeds: how many.
        part: "validation" or "test".
        images: seen in each training, instead of the form's.
        weights: "plain" or "centred".
    """
    lengths = IMAGES["quick" if form == "quick" else "day"]
    found = []
    for seed, one in itertools.product(range(seeds), {"quick": _quick, "day": _day, "full": _full}[form]()):
        usual = lengths[one.g] // (SCENES_FOR if is_segmentation(one.data) else 1)
        found.append(dataclasses.replace(one, seed=seed, part=part, images=images or usual, weights=weights))
    return list(dict.fromkeys(found))


def _product(
    data: Iterable[str],
    networks: Iterable[str],
    optimizers: Iterable[str],
    *,
    places: Sequence[tuple[int, int]] = PLACES,
    norms: Sequence[str] = NORMS,
    factors: Sequence[float] = (1.0,),
) -> Iterator[Settings]:
    """Combine everything that can be; a norm without statistics groups of its own has one run for each g."""
    pairs = [(norm, g, s if norm == "bkn" else g) for g, s in places for norm in norms]
    for kind, network, optimizer, factor, (norm, g, s) in itertools.product(data, networks, optimizers, factors, pairs):
        if is_segmentation(kind) == (network == SEGMENTER):
            yield Settings(kind, network, optimizer, g, s, norm, factor)


def _quick() -> Iterator[Settings]:
    """Eight places far from each other, the reference and ours at each."""
    for data, network, optimizer, place, factor in (
        ("glyphs", "cifar_resnet8", "sgd", (128, 1), 1.0),
        ("digits", "mobile", "adamw", (8, 1), 1.0),
        ("textures", "cifar_plain", "sgd", (8, 2), 1.0),
        ("glyphs", "cifar_preact_resnet14", "sgd", (2, 2), 2.0),
        ("cifar", "cifar_resnet8", "sgd", (128, 2), 1.0),
        ("cifar-inverted", "cifar_resnet20", "sgd", (128, 1), 4.0),
        ("cifar-faint", "cifar_plain", "adamw", (2, 1), 1.0),
        ("scenes", "unet", "sgd", (8, 1), 1.0),
    ):
        yield from _product((data,), (network,), (optimizer,), places=(place,), norms=("bn", "bkn"), factors=(factor,))


def _day() -> Iterator[Settings]:
    """Thin the grid: on each image set one network by all places, then the other networks, rates and optimizers."""
    usual = {"digits": "mobile", "textures": "cifar_plain", "cifar-inverted": "cifar_preact_resnet14"}
    usual |= {"cifar-faint": "cifar_resnet20", "scenes": SEGMENTER}
    ours, few = ("bn", "bkn"), ((128, 1), (8, 2), (2, 1))
    main = {name: (usual.get(name, "cifar_resnet8"),) for name in NAMES}
    for name in NAMES:
        yield from _product((name,), main[name], ("sgd",))
    for name in NAMES:
        yield from _product((name,), main[name], ("sgd",), norms=ours, factors=(0.25, 4.0))
    for name in NAMES:
        yield from _product((name,), main[name], ("adamw",), places=few, norms=ours, factors=(0.25, 1.0, 4.0))
    for name in ("glyphs", "cifar"):
        yield from _product((name,), CLASSIFIERS, ("sgd",), places=few, norms=ours, factors=(1.0, 4.0))
        yield from _product((name,), main[name], ("sgd",), norms=ours, factors=(0.5, 2.0))


def _full() -> Iterator[Settings]:
    return _product(NAMES, (*CLASSIFIERS, SEGMENTER), OPTIMIZERS, factors=FACTORS)


def chosen(runs: Iterable[Settings], only: str) -> list[Settings]:
    """Keep what fits all words NAME=VALUE of a list with commas; VALUE+VALUE means either.

    s chooses among the runs of "bkn" only, so that what they are compared with stays.
    """
    wanted = [word.partition("=") for word in only.split(",") if word]
    names = [field.name for field in dataclasses.fields(Settings)]
    for name, _, values in wanted:
        if name not in names or not values:
            raise ValueError(f"--only has {name}={values}; write NAME=VALUE with a name of {', '.join(names)}")
    return [run for run in runs if all(_fits(run, name, values.split("+")) for name, _, values in wanted)]


def _fits(run: Settings, name: str, values: list[str]) -> bool:
    value = getattr(run, name)
    if name == "s" and run.norm != "bkn":
        return True
    return any(float(v) == value if isinstance(value, float | int) else v == value for v in values)
