"""What the README shows works as shown."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
import torchvision
from torch import nn
from typer.testing import CliRunner

import bkn_core as bkn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONVERT, ACCUMULATE, SAVE, FINE_TUNE = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = sorted(
    {m[0].split("  #")[0].strip() for m in re.finditer(r"^bkn (train|eval|compare|export).*$", README, re.M)}
)


def test_the_python_example_trains_a_converted_model() -> None:
    code = CONVERT
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
    exec(code, names, names)
    model = names["model"]
    assert isinstance(model, nn.Sequential) and int(model[1].num_batches_tracked) == 2
    assert not torch.equal(model[0].weight, plain[0].weight)  # which the example's optimizer has moved
    assert [report.prior for report in bkn.conversion_report(model)] == ["input -> 0", "relu(1) -> 3"]


def test_the_accumulation_example_steps_once_for_several_forwards() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 2, 3, 8, 8)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    model = bkn.convert(plain, images[0], statistics_batch_size=2, input_prior=images.flatten(0, 1)).train()
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = [(part, torch.tensor([0, 1])) for part in images]
    exec(ACCUMULATE, {"bkn": bkn, "torch": torch, "model": model, "parts": parts, "optimizer": optimizer})
    assert int(model[1].num_batches_tracked) == 1  # the block counts as one forward
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_saved_model_loads_into_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))

    monkeypatch.chdir(tmp_path)
    images = torch.randn(4, 3, 8, 8)
    model = bkn.convert(build(), images, statistics_batch_size=2, input_prior=2 * images)
    model(images)
    names = {"torch": torch, "bkn": bkn, "model": model, "build": build, "example_images": images}
    exec(SAVE, names)
    loaded = names["loaded"]
    assert isinstance(loaded, nn.Module) and torch.equal(loaded(images), model(images))


def test_the_fine_tuning_example_ends_in_a_file_that_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def resnet(weights: str) -> nn.Module:
        """The shape of a ResNet-18 with a quarter of its layers, and statistics as training leaves them."""
        assert weights == "DEFAULT"
        model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=2)
        for _ in range(3):
            model(images)
        return model

    def train(model: nn.Module) -> None:
        loop = CONVERT[CONVERT.index("for images") :]
        names = {"model": model, "torch": torch, "loader": [(images, torch.tensor([0, 1, 0, 1]))]}
        exec(loop, names | {"optimizer": _Late({"model": model})})

    monkeypatch.chdir(tmp_path)
    images = torch.randn(4, 3, 32, 32)
    stand_in = SimpleNamespace(models=SimpleNamespace(resnet18=resnet))
    names = {"torch": torch, "torchvision": stand_in, "bkn": bkn, "images": images, "train": train}
    exec(FINE_TUNE, names)
    model = names["model"]
    assert isinstance(model, nn.Module) and all(report.prior for report in bkn.conversion_report(model))
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model.eval()(images), rtol=1e-3, atol=1e-4)


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
    found = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    links = [link for link in found if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links)
