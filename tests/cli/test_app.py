"""The program: help, version, usage errors, start-up."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from calls import call

HEAVY = ("torch", "torchvision", "numpy", "onnx", "onnxruntime", "yaml", "scipy", "sklearn", "matplotlib")


@pytest.mark.parametrize("words", [(), ("train",), ("eval",), ("compare",), ("export",), ("predict",), ("keys",)])
def test_help_shows_an_example_and_ends_well(words: tuple[str, ...]) -> None:
    result = call(*words, "--help")
    assert result.exit_code == 0
    assert f"bkn {words[0] if words else 'train'}" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("verb", ["train", "eval", "compare", "export", "predict", "keys"])
def test_help_shows_whole_option_names_in_eighty_columns(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert "…" not in call(verb, "--help").stdout


def test_help_names_every_exit_code() -> None:
    text = call("--help").stdout
    for code in (0, 1, 2, 3, 4, 5, 6, 7, 8, 129, 130, 143):
        assert f" {code} " in text


def test_without_a_verb_the_program_shows_its_help() -> None:
    result = call()
    assert result.exit_code == 2
    assert "train" in result.output


def test_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert call("--version").stdout == f"bkn {version('bkn')}\n"


@pytest.mark.parametrize(
    ("words", "schema", "named"),
    [
        (("nope",), "bkn.usage/1", "nope"),
        (("train", "--epochs", "3"), "bkn.train/1", "--epochs; as a key of the recipe it is train.epochs=3"),
        (("train", "--epoch=3"), "bkn.train/1", "--epoch; as a key of the recipe it is train.epochs=3"),
        (("train", "--batch-size", "4"), "bkn.train/1", "it is batch.gradient=4 batch.per_device=4"),
        (("train", "--momentum"), "bkn.train/1", "it is norm.momentum=VALUE or optim.momentum=VALUE"),
        (("compare", "--model", "resnet18"), "bkn.compare/1", "it is model.name=resnet18"),
        (("train", "--nprocs", "2"), "bkn.train/1", "No such option: --nprocs (Possible options: --nproc)"),
        (("train", "--zzz"), "bkn.train/1", "No such option: --zzz"),
        (("eval", "--batch-size", "0"), "bkn.eval/1", "--batch-size"),
        (("eval", "--stats", "mean"), "bkn.eval/1", "'population', 'batch', 'both'"),
        (("compare", "--seeds", "x"), "bkn.compare/1", "--seeds"),
        (("export",), "bkn.export/1", "OUTPUT.onnx"),
        (("export", "m.onnx", "--precision", "int8"), "bkn.export/1", "'fp32', 'fp16'"),
    ],
)
def test_a_usage_error_is_one_json_object_too(words: tuple[str, ...], schema: str, named: str) -> None:
    result = call(*words, "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == document["error"]["exit"] == 2
    assert (document["schema"], document["ok"], document["error"]["code"]) == (schema, False, "usage")
    assert named in document["error"]["message"]


def test_a_usage_error_without_json_leaves_standard_output_empty() -> None:
    result = call("train", "--epochs", "3")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--epochs" in result.stderr


def test_help_imports_nothing_heavy() -> None:
    program = f"""
import sys
from typer.testing import CliRunner
from bkn_cli.app import app
result = CliRunner().invoke(app, ["train", "--help"])
print(result.exit_code, [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "0 []\n"


def test_completion_offers_the_verbs() -> None:
    program = "from bkn_cli.app import app; app(prog_name='bkn')"
    environment = {"COMP_WORDS": "bkn ", "COMP_CWORD": "1", "_BKN_COMPLETE": "complete_bash"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["train", "eval", "compare", "export", "predict", "keys"]
