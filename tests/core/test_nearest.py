"""The search among many, against comparing each with each."""

import torch

from uldm_cli import assets
from uldm_cli.core.lpips import LPIPS
from uldm_cli.core.nearest import Search
from uldm_cli.formats.native import load_tensors


def test_equals_comparing_each_with_each() -> None:
    lpips = LPIPS(load_tensors(assets.path("lpips-alex.safetensors")), "alex")
    images = torch.randint(0, 256, (12, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[7] = images[0] // 2 + images[1] // 2  # so that not all are equally far
    queries, own = images[[0, 1, 3]], torch.tensor([-1, 1, -1])
    search = Search(queries, own, lpips, k=3)
    for part in torch.arange(12).split(5):
        search.update(images[part], part)

    x = images.float() / 127.5 - 1
    for q, number in enumerate((0, 1, 3)):
        pixels = (x[number] - x).square().mean((1, 2, 3)).sqrt() / 2
        perceptual = lpips(x[number].expand(12, -1, -1, -1), x).flatten()
        for distance, found in ((pixels, search.pixels), (perceptual, search.perceptual)):
            if own[q] >= 0:
                distance[number] = torch.inf
            nearest = distance.sort()
            assert found.index[q].tolist() == nearest.indices[:3].tolist()
            torch.testing.assert_close(found.distance[q].float(), nearest.values[:3], rtol=1e-5, atol=2e-6)
    assert search.pixels.distance[0, 0] == 0  # itself, which counts here


def test_fewer_candidates_than_wanted() -> None:
    lpips = LPIPS(load_tensors(assets.path("lpips-alex.safetensors")), "alex")
    images = torch.randint(0, 256, (2, 1, 31, 31), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    search = Search(images[:1], torch.tensor([0]), lpips, k=2)
    search.update(images, torch.arange(2))
    assert search.perceptual.index.tolist() == search.pixels.index.tolist() == [[1, -1]]
    assert search.pixels.distance[0, 1] == torch.inf
