"""Seams and colour shifts: what is put in is read, and a clean picture has none."""

import numpy as np
import pytest
import skimage.color
import skimage.data
import torch
from torch.nn.functional import avg_pool2d

from linearsr.artefacts import ROUNDING, colour_shift, evaluation_tiles, grid_edges, seam, tile_edges
from linearsr.tiles import cut


@pytest.fixture(scope="module")
def photograph():
    return torch.from_numpy(skimage.data.astronaut()[:256, :256].copy()).permute(2, 0, 1).float() / 255


def test_tile_edges_are_where_tiles_begin_and_end_inside_the_picture():
    rows, columns = tile_edges(cut((8, 4), 4, 2), 8, (60, 32))
    assert rows == (16, 32, 48)
    assert columns == ()
    assert tile_edges(evaluation_tiles((1, 1)), 8, (8, 8)) == ((), ())
    assert evaluation_tiles((16, 20)).side == (8, 8)
    assert grid_edges(16, (40, 16)) == ((16, 32), ())


def test_a_seam_of_known_height_is_read_as_its_energy():
    """Noise of known gradient energy, and a step of known height across every edge."""
    generator = torch.Generator().manual_seed(0)
    clean = 0.5 + 0.02 * torch.randn(3, 256, 256, generator=generator)
    edges = grid_edges(32, (256, 256))
    assert seam(clean, edges) == pytest.approx(1, abs=0.03)
    height = 0.03
    place = torch.arange(256) // 32 % 2 * height
    with_seams = clean + place[:, None] + place[None, :]
    expected = 1 + height**2 / (2 * 0.02**2 + ROUNDING)
    assert seam(with_seams, edges) == pytest.approx(expected, rel=0.05)
    assert seam(with_seams, edges, clean) == pytest.approx(expected, rel=0.05)


def test_edges_of_what_the_picture_shows_are_no_seams(photograph):
    edges = grid_edges(64, (256, 256))
    ruled = photograph.clone()
    ruled[:, 64:128] = 1 - ruled[:, 64:128]
    assert seam(ruled, edges) > 2
    assert seam(ruled, edges, ruled) == 1
    assert seam(ruled, ((), ())) == 1
    assert seam(torch.full((3, 64, 64), 0.5), grid_edges(16, (64, 64))) == 1


def test_a_cast_of_known_delta_e_is_read_as_that(photograph):
    lr = avg_pool2d(photograph[None], 4)[0]
    assert colour_shift(photograph, lr) < 1e-4
    flat = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1).expand(3, 64, 64).contiguous()
    lab = skimage.color.rgb2lab(flat.permute(1, 2, 0).double().numpy())
    moved = torch.from_numpy(skimage.color.lab2rgb(lab + np.array([0, 3, 4]))).permute(2, 0, 1)
    assert colour_shift(moved, flat[:, ::4, ::4]) == pytest.approx(5, abs=0.01)
    picture = skimage.color.rgb2lab(photograph.permute(1, 2, 0).double().numpy())
    cast = torch.from_numpy(skimage.color.lab2rgb(np.clip(picture, [10, -128, -128], [90, 127, 127]) + np.array([2.0, 0, 0])))
    plain = torch.from_numpy(skimage.color.lab2rgb(np.clip(picture, [10, -128, -128], [90, 127, 127])))
    lr = avg_pool2d(plain.permute(2, 0, 1)[None], 4)[0]
    assert colour_shift(cast.permute(2, 0, 1), lr) == pytest.approx(2, abs=0.1)


def test_texture_is_no_shift_and_sizes_must_fit(photograph):
    generator = torch.Generator().manual_seed(0)
    lr = avg_pool2d(photograph[None], 4)[0]
    assert colour_shift(photograph + 0.05 * torch.randn(3, 256, 256, generator=generator), lr) < 0.6
    odd = torch.rand(3, 36, 52, generator=generator)
    assert colour_shift(odd, avg_pool2d(odd[None], 4)[0]) < 1e-4
    with pytest.raises(ValueError, match="whole ratio"):
        colour_shift(odd, torch.rand(3, 10, 13))
