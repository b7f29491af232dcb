"""The place of a batch in the epoch, augmentation and normalization."""

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from bkn_core.data.batches import BatchPlan, augment, epoch_order, generator_at, normalize
from bkn_core.data.preprocess import Preprocess
from bkn_core.errors import RecipeError

COLOUR = Preprocess("RGB", (16, 12), (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))


def drawn_images(count: int = 64, size: tuple[int, int] = (16, 24)) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator_at(0))


def test_normalize_is_the_formula_in_float64() -> None:
    images = drawn_images()
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (COLOUR.mean, COLOUR.std))
    expected = (images.numpy().astype(np.float64) / 255 - mean) / std
    result = normalize(images, COLOUR)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("wanted", [torch.contiguous_format, torch.channels_last])
def test_normalize_gives_the_layout_asked_for(given: torch.memory_format, wanted: torch.memory_format) -> None:
    images = drawn_images().contiguous(memory_format=given)
    result = normalize(images, COLOUR, memory_format=wanted)
    assert result.is_contiguous(memory_format=wanted)
    assert torch.equal(result, normalize(drawn_images(), COLOUR))


def test_normalize_leaves_float_images_as_they_were() -> None:
    images = drawn_images().float()
    before = images.clone()
    normalize(images, COLOUR)
    assert torch.equal(images, before)


def test_augment_none_changes_nothing() -> None:
    images = drawn_images()
    assert torch.equal(augment(images, "none", generator_at(0)), images)


def test_flip_mirrors_about_half_of_the_images_and_changes_nothing_else() -> None:
    images = drawn_images(400)
    flipped = augment(images, "flip", generator_at(1))
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 160 < int(mirrored.sum()) < 240


def find_window(image: np.ndarray, padded: np.ndarray) -> set[tuple[int, int]]:
    """Every (top, left) at which the image lies in the padded one."""
    height, width = image.shape[1:]
    return {
        (top, left)
        for top in range(padded.shape[1] - height + 1)
        for left in range(padded.shape[2] - width + 1)
        if np.array_equal(padded[:, top : top + height, left : left + width], image)
    }


def test_crop_flip_cuts_every_window_of_the_black_padded_image() -> None:
    images = drawn_images(300)
    cropped = augment(images, "crop_flip", generator_at(2)).numpy()
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (3, 3)))
    straight = [find_window(result, source) for result, source in zip(cropped, padded, strict=True)]
    mirrored = [find_window(result[..., ::-1], source) for result, source in zip(cropped, padded, strict=True)]
    assert all(len(one) + len(other) == 1 for one, other in zip(straight, mirrored, strict=True))
    assert {window for found in straight + mirrored for window in found} == {(t, w) for t in range(5) for w in range(7)}
    assert 100 < sum(map(len, mirrored)) < 200


@pytest.mark.parametrize("kind", ["flip", "crop_flip"])
def test_augment_moves_floats_as_it_moves_bytes(kind: str) -> None:
    images = drawn_images()
    moved = augment(images.float(), kind, generator_at(3))
    assert torch.equal(moved, augment(images, kind, generator_at(3)).float())


@pytest.mark.parametrize("kind", ["flip", "crop_flip"])
def test_augment_draws_from_its_generator_alone(kind: str) -> None:
    state = torch.get_rng_state()
    first = augment(drawn_images(), kind, generator_at(4))
    torch.rand(7)
    assert torch.equal(augment(drawn_images(), kind, generator_at(4)), first)
    assert not torch.equal(augment(drawn_images(), kind, generator_at(5)), first)
    torch.set_rng_state(state)
    augment(drawn_images(), kind, generator_at(4))
    assert torch.equal(torch.get_rng_state(), state)


def test_augment_refuses_an_unknown_kind() -> None:
    with pytest.raises(RecipeError, match=r"data.augment is 'mixup'; choose one of none, flip, crop_flip"):
        augment(drawn_images(), "mixup", generator_at(0))


def test_generators_at_different_positions_differ() -> None:
    positions = [(), (0,), (0, 0), (1,), (1, 0), (0, 1), (2**32 - 1,)]
    assert len({generator_at(seed, *position).initial_seed() for seed in (0, 1) for position in positions}) == 14


def test_epoch_order_depends_on_seed_and_epoch_alone() -> None:
    state = torch.get_rng_state()
    order = epoch_order(100, 3, 2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(epoch_order(100, 3, 2), order)
    assert order.tolist() != epoch_order(100, 3, 1).tolist()
    assert order.tolist() != epoch_order(100, 2, 2).tolist()


@hypothesis.given(images=st.integers(1, 200), seed=st.integers(0, 2**32), epoch=st.integers(0, 1000))
def test_epoch_order_is_a_permutation(images: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(images, seed, epoch).tolist()) == list(range(images))


@hypothesis.given(images=st.integers(1, 200), per_device=st.integers(1, 40), world_size=st.integers(1, 5))
def test_processes_together_see_what_one_with_the_joint_batch_sees(
    images: int, per_device: int, world_size: int
) -> None:
    order = epoch_order(images, 0, 0)
    alone = BatchPlan(images, per_device * world_size)
    plans = [BatchPlan(images, per_device, rank, world_size) for rank in range(world_size)]
    seen = []
    for index in range(len(alone)):
        joint = torch.cat([plan.batch(order, index) for plan in plans])
        assert torch.equal(joint, alone.batch(order, index))
        assert all(plan.joint_images(index) == len(joint) > 0 for plan in plans)
        seen += joint.tolist()
    assert seen == order.tolist()
    assert {len(plan) for plan in plans} == {len(alone)}
