"""What the README shows works as shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import bkn_core as bkn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(
    {m[0].split("  #")[0].strip() for m in re.finditer(r"^bkn (train|eval|compare|export).*$", README, re.M)}
)


def test_the_python_example_trains_a_converted_model() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(64, 2),
    )
    images = torch.randn(4, 3, 8, 8)
    names = {
        "torch": torch,
        "model": plain,
        "example_images": images,
        "training_images": images,
        "loader": [(images, torch.tensor([0, 1, 0, 1]))] * 2,
    }
    optimizer = _Late(names)
    exec(code, names | {"optimizer": optimizer}, names)
    model = names["model"]
    assert isinstance(model, nn.Module) and optimizer.steps == 2
    assert [report.prior for report in bkn.conversion_report(model)] == ["input -> 0", "relu(1) -> 3"]


class _Late:
    """An optimizer that takes the parameters of whatever `model` is by then."""

    def __init__(self, names: dict[str, object]) -> None:
        self.names, self.steps = names, 0

    def step(self) -> None:
        model = self.names["model"]
        assert isinstance(model, nn.Module)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        self.steps += 1

    def zero_grad(self) -> None:
        model = self.names["model"]
        assert isinstance(model, nn.Module)
        model.zero_grad()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_of_a_command_exist(command: str) -> None:
    from bkn_cli.app import app

    _, verb, *words = command.split()
    text = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    options = [word for word in words if word.startswith("--")]
    assert [option for option in options if option not in text] == []


def test_named_recipes_are_shipped() -> None:
    named = set(re.findall(r"\b(?:cifar10|digits)_\w+", README))
    assert named <= set(bkn.shipped_recipes())


def test_linked_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links)
