"""Pictures side by side in one picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image


def contact_sheet(pictures: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Put pictures in rows, on white.

    Args:
        pictures: at least one; each goes into a cell of the size of the largest.
        columns: pictures of a row.
        gap: pixels around each cell.

    Returns:
        RGB.

    Raises:
        ValueError: there are no pictures, or fewer than one column.
    """
    if not pictures or columns < 1:
        raise ValueError(f"a contact sheet of {len(pictures)} pictures in {columns} columns")
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    size = (columns * (width + gap) + gap, rows * (height + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        sheet.paste(picture, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet
