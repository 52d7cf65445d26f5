"""Where a condition goes, and that of inpainting."""

import pytest
import torch
from torch import Tensor

from uldm_cli.core.conditioning import inpainting_condition, place
from uldm_cli.errors import UsageError

ENCODED, CONCAT = torch.ones(2, 3), torch.zeros(2, 1, 4, 4)


@pytest.mark.parametrize(("conditioning", "name"), [("concat", "concat"), ("crossattn", "context"), ("adm", "label")])
def test_one_part_has_one_place(conditioning, name: str) -> None:
    parts = vars(place(conditioning, ENCODED))
    assert {key for key, value in parts.items() if value is not None} == {name}
    assert parts[name] is ENCODED


def test_a_hybrid_condition_has_two_parts() -> None:
    condition = place("hybrid", ENCODED, CONCAT)
    assert condition.context is ENCODED
    assert condition.concat is CONCAT
    assert condition.label is None


def test_parts_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match=r"^the concatenated part of the condition is missing"):
        place("hybrid", ENCODED)
    with pytest.raises(UsageError, match="is not taken by a model with crossattn conditioning"):
        place("crossattn", ENCODED, CONCAT)


def corners(images: Tensor) -> Tensor:
    """Latents of half the size: each two by two pixels' first."""
    return images[:, :, ::2, ::2]


def test_inpainting_sees_the_image_without_the_hole_and_the_hole() -> None:
    image = torch.linspace(-1, 1, 96).view(2, 3, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, :2] = 0.5  # belongs to the hole
    mask[1, :, 2:] = 0.4  # does not
    concat = inpainting_condition(corners, image, mask).concat
    assert concat is not None
    assert concat.shape == (2, 4, 2, 2)
    black = image.clone()
    black[0, :, :2] = -1
    torch.testing.assert_close(concat[:, :3], corners(black))
    assert concat[:, 3].tolist() == [[[1, 1], [-1, -1]], [[-1, -1], [-1, -1]]]


def test_a_mask_of_another_shape() -> None:
    with pytest.raises(UsageError) as caught:
        inpainting_condition(corners, torch.zeros(2, 3, 4, 4), torch.zeros(1, 1, 4, 4))
    assert str(caught.value) == "the mask has the shape [1, 1, 4, 4]. These images need [2, 1, 4, 4]"
