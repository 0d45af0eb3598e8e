"""Contact sheets: every picture once, in its cell."""

import pytest
from PIL import Image

from zimage_core.contact_sheet import contact_sheet


def test_pictures_stand_in_rows_in_their_order():
    colors = ["red", "lime", "blue"]
    sheet = contact_sheet([Image.new("RGB", (10, 20), c) for c in colors], columns=2, gap=4)
    assert sheet.size == (2 * 14 + 4, 2 * 24 + 4)
    found = [sheet.getpixel(at) for at in ((4, 4), (18, 4), (4, 28), (18, 28), (0, 0))]
    white = (255, 255, 255)
    assert found == [(255, 0, 0), (0, 255, 0), (0, 0, 255), white, white]


def test_cells_are_as_large_as_the_largest_picture():
    pictures = [Image.new("RGB", size, "red") for size in ((10, 30), (20, 5))]
    assert contact_sheet(pictures, columns=8, gap=0).size == (40, 30)


def test_nothing_to_show_is_an_error():
    with pytest.raises(ValueError, match="0 pictures in 3 columns"):
        contact_sheet([], 3)
    with pytest.raises(ValueError, match="1 pictures in 0 columns"):
        contact_sheet([Image.new("RGB", (1, 1))], 0)
