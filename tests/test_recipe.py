"""The recipe: defaults, precedence, what is refused, and the words it is refused with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from recipe_faults import faults

from bkn_core.errors import RecipeError
from bkn_core.kinds import KINDS
from bkn_core.recipe import dump_recipe, load_recipe, parse_recipe

CORE = Path(__file__).parent.parent / "bkn_core"


SPECIFIED = """
model: {name: cifar_resnet8, pretrained: false, args: {}}
norm: {kind: bkn, transition: network, message: normalized, covariance: diagonal, gain: auto, learn_gain: true,
       gain_schedule: anneal, correction: false, innovation: true, input_prior: true, weights: plain,
       eps: null, momentum: null}
batch: {gradient: 128, statistics: 2, per_device: 128}
data: {name: digits, root: data, image_size: 16, resize: stretch, train_images: null, test_images: null,
       validation: null, augment: none, scale: null, jitter: 0.0, rand_augment: null, mixup: null, cutmix: null,
       download: false}
train: {epochs: 10, seed: 0, device: auto, amp: auto, compile: false, channels_last: true, ema: null, clip_norm: null,
        label_smoothing: 0.0, loss: cross_entropy, class_weights: null, patience: null, workers: null,
        deterministic: false, nonfinite: stop}
optim: {name: sgd, lr: 0.1, momentum: 0.9, nesterov: true, weight_decay: 5.0e-4, norm_weight_decay: 0.0,
        gain_lr_scale: 1.0, schedule: onecycle, warmup: 0.2, milestones: [0.5, 0.75], gamma: 0.1}
eval: {batch_size: 250, stats: auto, topk: [1, 5]}
log: {every: 20, tensorboard: false, plots: true}
compare: {norms: [bn, bkn], statistics_batch_sizes: null, gradient_batch_sizes: null, models: null,
          learning_rates: null, learning_rate_power: 0.0, seeds: 1}
"""


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ((), "digits"),
        (("data.root=photos",), "imagefolder"),
        (("data.root=photos.zip",), "imagefolder"),
        (("data.root=photos.NPZ",), "npz"),
        (("data.root=photos.npz", "data.name=imagefolder"), "imagefolder"),
        (("data.root=photos", "data.name=CIFAR10"), "CIFAR10"),
    ],
    ids=str,
)
def test_the_root_of_the_data_says_what_they_are(words: tuple[str, ...], name: str) -> None:
    recipe = load_recipe(None, words)
    assert recipe.data.name == name
    assert recipe.data.image_size == (16 if name == "digits" else None)
    assert parse_recipe(dump_recipe(recipe), "again") == recipe


@pytest.mark.parametrize("recipe", ["digits_micro", "cifar10_resnet_micro"])
def test_a_root_takes_the_place_of_the_shipped_data(recipe: str) -> None:
    assert load_recipe(recipe, ["data.root=other.npz"]).data.name == "npz"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data.name=digits", "data.root=photos"), "data.root is 'photos', but data.name is digits, which is built in"),
        (("data.download=true",), "data.download is true, but data.name is digits, which is not downloaded"),
        (("data.root=photos", "data.download=true"), "data.download is true, but data.name is imagefolder"),
    ],
)
def test_a_key_that_would_decide_nothing_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(None, words)


def test_what_was_saved_of_digits_may_name_a_root_that_it_never_read(tmp_path: Path) -> None:
    saved = dump_recipe(load_recipe()).replace("  root: data", "  root: elsewhere")
    assert "elsewhere" in saved
    assert parse_recipe(saved, "a checkpoint").data.root == "data"
    (tmp_path / "config.yaml").write_text(saved)
    assert load_recipe(tmp_path / "config.yaml").data.root == "data"


def test_defaults_are_the_specified_ones(write: Any) -> None:
    recipe = load_recipe(write("version: 1\n"))
    expected = {"version": 1, "name": "mine", "task": "classification", **yaml.safe_load(SPECIFIED)}
    assert yaml.safe_load(dump_recipe(recipe)) == expected


def test_no_source_is_the_shipped_digits_micro() -> None:
    assert load_recipe() == load_recipe("digits_micro")
    assert load_recipe().name == "digits_micro"


def test_parent_gives_way_to_recipe_and_recipe_to_words(write: Any) -> None:
    write("train: {epochs: 2, seed: 2, ema: 0.2}\nname: parent\n", "base.yaml")
    recipe = load_recipe(write("extends: base.yaml\ntrain: {seed: 3, ema: 0.3}\n"), ["train.ema=0.4", "train.ema=0.5"])
    assert (recipe.train.epochs, recipe.train.seed, recipe.train.ema, recipe.name) == (2, 3, 0.5, "mine")


def test_arguments_of_the_model_are_replaced_as_a_whole_by_a_file_and_one_by_one_by_a_word(write: Any) -> None:
    write("model: {args: {width: 16, depth: 3}}\n", "base.yaml")
    child = write("extends: base.yaml\nmodel: {args: {width: 8}}\n")
    assert load_recipe(child).model.args == {"width": 8}
    assert load_recipe(child, ["model.args.depth=2"]).model.args == {"width": 8, "depth": 2}


@pytest.mark.parametrize(
    ("word", "section", "key", "value"),
    [
        ("norm.gain=0.05", "norm", "gain", 0.05),
        ("norm.eps=1e-3", "norm", "eps", 1e-3),
        ("optim.lr=1", "optim", "lr", 1.0),
        ("eval.topk=[1,3]", "eval", "topk", (1, 3)),
        ("data.train_images=null", "data", "train_images", None),
        ("data.validation=0.2", "data", "validation", 0.2),
        ("data.validation=photos/val", "data", "validation", "photos/val"),
        ("data.root=~/images:1/x.zip", "data", "root", "~/images:1/x.zip"),
        ("data.image_size=[16, 24]", "data", "image_size", (16, 24)),
        ("norm={kind: in, eps: 1e-3}", "norm", "kind", "in"),
        ("train.device=cuda:1", "train", "device", "cuda:1"),
        ("train.amp=false", "train", "amp", False),
        ("train.class_weights=[1, 2.5]", "train", "class_weights", (1.0, 2.5)),
        ("train.class_weights=balanced", "train", "class_weights", "balanced"),
    ],
)
def test_word_is_read_as_yaml(word: str, section: str, key: str, value: object) -> None:
    read = getattr(getattr(load_recipe(None, [word]), section), key)
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("gradient", "statistics", "expected"),
    [(128, 2, 128), (32, 2, 32), (512, 2, 128), (96, 3, 96), (129, 3, 3), (192, 2, 96), (256, 256, 256), (1, 1, 1)],
)
def test_per_device_is_the_largest_whole_size_up_to_128(gradient: int, statistics: int, expected: int) -> None:
    words = [f"batch.gradient={gradient}", f"batch.statistics={statistics}"]
    sizes = [n for n in range(1, 129) if n % statistics == 0 and gradient % n == 0]
    assert load_recipe(None, words).batch.per_device == expected == max(sizes, default=statistics)


def test_digits_are_enlarged_unless_told_otherwise() -> None:
    assert load_recipe().data.image_size == 16
    assert load_recipe(None, ["data.image_size=null"]).data.image_size is None
    assert load_recipe(None, ["data.name=CIFAR10"]).data.image_size is None


def test_automatic_gain_and_evaluation_follow_the_statistics_batch_size() -> None:
    single = load_recipe(None, ["batch.statistics=1"])
    assert (single.resolved_gain, single.eval_stats) == ("auto", "batch")
    assert (load_recipe().resolved_gain, load_recipe().eval_stats) == ("auto", "population")
    told = load_recipe(None, ["batch.statistics=1", "norm.gain=0.3", "eval.stats=both"])
    assert (told.resolved_gain, told.eval_stats) == (0.3, "both")
    assert load_recipe(None, ["norm.kind=bn"]).resolved_gain == 1.0


def test_recipe_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe().norm.kind = "bn"


def test_all_faults_of_file_parent_and_words_are_reported_at_once(write: Any) -> None:
    write("\ntrain: {epochs: 1.5, seed: true}\n", "base.yaml")
    path = write(
        "extends: base.yaml\nnorm:\n  knid: bkn\n  kind: bnk\n  eps: .nan\nbatch: {per_device: 7, gradient: -1}\n"
    )
    base = path.with_name("base.yaml")
    message = faults(path, "optim.lr=0", "evall.topk=3", "oops", "log.every=[")
    assert message.splitlines() == [
        "the recipe has 11 faults:",
        "command line 'oops': this is not KEY=VALUE; write for example norm.kind=bn",
        "command line 'log.every=[': not valid YAML: expected the node content, but found '<stream end>'",
        f"{path}:4: norm.kind is 'bnk'; choose one of {', '.join(KINDS)} (did you mean 'bkn'?)",
        f"{path}:5: norm.eps is nan; give a finite number above 0, or null for the network's own",
        f"{path}:3: norm.knid is not a key (did you mean 'norm.kind'?)",
        f"{path}:6: batch.gradient is -1; give an integer of at least 1",
        f"{base}:2: train.epochs is 1.5; give an integer of at least 1",
        f"{base}:2: train.seed is true; give an integer from 0 to 4294967295",
        "command line 'optim.lr=0': optim.lr is 0; give a finite number above 0",
        "command line 'evall.topk=3': evall.topk is not a key (did you mean 'eval.topk'?)",
        f"{path}:6: batch.per_device is 7; give a multiple of batch.statistics (2)",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr: 0.1", "lr is not a key (did you mean 'optim.lr'?)"),
        ("batch_size: 32", "batch_size is not a key (did you mean 'batch.gradient' and 'batch.per_device'?)"),
        ("train: {batch_size: 32}", "(did you mean 'batch.gradient' and 'batch.per_device'?)"),
        ("norm: {statistics_batch_size: 2}", "(did you mean 'batch.statistics'?)"),
        ("momentum: 0.1", "momentum is not a key (did you mean 'norm.momentum' or 'optim.momentum'?)"),
        ("norm: {knd: bn}", "norm.knd is not a key (did you mean 'norm.kind'?)"),
        ("knd: bn", "knd is not a key (did you mean 'norm.kind'?)"),
        ("model: resnet18", "in a word of its own, such as model.name=..."),
        ("norm.kind: bn", "norm.kind is not a key here; write it as norm: {kind: ...}"),
        ("nrom: {kind: bn}", "nrom is not a key (did you mean 'norm'?)"),
        ("log: {zzz: 1}", "log.zzz is not a key; choose one of every, tensorboard, plots"),
        ("norm: {kind: BN}", "(did you mean 'bn'?)"),
        ("norm: 5", "norm is 5; give a mapping of keys to values"),
        ("norm:", "norm is null; give a mapping of keys to values"),
        ("version: 2", "version is 2; give 1"),
        ("version: true", "version is true; give 1"),
        ("name: ../x", "name is '../x'; give letters, digits and any of _ . -"),
        ("train: {compile: yes}", "train.compile is 'yes'; give true or false"),
        ("train: {device: gpu}", "train.device is 'gpu'; give auto, cpu, mps or cuda[:N]"),
        ("train: {ema: 1}", "train.ema is 1; give a number above 0 and below 1, or null for none"),
        ("optim: {lr: '1e-3'}", "optim.lr is '1e-3'; give a finite number above 0"),
        ("optim: {lr: 1e999}", "optim.lr is inf; give a finite number above 0"),
        ("norm: {gain: 1.5}", "norm.gain is 1.5; give auto or a number in (0, 1]"),
        ("data: {image_size: [1, 2, 3]}", "data.image_size is [1, 2, 3]; give an integer"),
        ("data: {validation: 1}", "data.validation is 1; give a share of the training images above 0 and below 1, the"),
        ("data: {validation: true}", "data.validation is true; give a share of the training images"),
        ("data: {name: 2024}", "data.name is 2024; give text (in quotes where it looks like a number)"),
        ('data: {root: "a\\0b"}', "data.root is 'a\\x00b'; give text"),
        ("model: {args: {x: [1]}}", "model.args is {'x': [1]}; give a mapping of argument names to plain values"),
        ("eval: {topk: [1, true]}", "eval.topk is [1, True]; give a list of integers"),
    ],
)
def test_fault_names_place_key_value_and_what_is_allowed(write: Any, text: str, expected: str) -> None:
    path = write(text)
    message = faults(path)
    assert message.startswith(f"{path}:1: ")
    assert expected in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["norm.learn_gain=true", "norm.gain=1"], "norm.gain is 1.0; norm.learn_gain true needs a number below 1"),
        (["optim.nesterov=true", "optim.momentum=0"], "optim.momentum is 0.0; optim.nesterov true needs a number"),
        (
            ["batch.gradient=128", "batch.statistics=3"],
            "batch.gradient is 128; give a multiple of batch.statistics (3)",
        ),
        (
            ["batch.per_device=128", "batch.statistics=3"],
            "batch.per_device is 128; give a multiple of batch.statistics (3)",
        ),
        (["batch.per_device=12"], "batch.per_device is 12; give a multiple of batch.statistics (2) that divides"),
    ],
)
def test_values_that_cannot_work_together_are_refused(words: list[str], expected: str) -> None:
    message = faults(None, *words)
    assert f"command line '{words[0]}'" in message
    assert expected in message


@pytest.mark.parametrize(
    "words",
    [
        ["norm.gain=1", "norm.learn_gain=false"],
        ["norm.gain=1", "norm.kind=gn"],
        ["optim.momentum=0", "optim.name=adamw"],
    ],
)
def test_the_same_values_pass_where_they_can_work(words: list[str]) -> None:
    assert load_recipe(None, words).name == "digits_micro"


def test_error_can_be_written_to_any_terminal(write: Any) -> None:
    message = faults(write('"\\e[31m\\u202e": 1\nnorm: {kind: "\\e[2J"}'), "x\udcff=1", "norm.kind=\udcff")
    assert all(line.isprintable() for line in message.splitlines())
    message.encode()
