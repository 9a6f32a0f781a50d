"""The demo's picture: a grid of images with titles, as a PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

_GAP = 12
_TITLE_HEIGHT = 44
_CAPTION_HEIGHT = 36
_LABEL_WIDTH = 120
_BACKGROUND = (250, 250, 248)
_INK = (32, 32, 36)
_QUIET = (110, 110, 116)


def amplified_difference(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, float]:
    """|a - b| as pixels in [-1, 1] (black is no difference), amplified, and the amplification: the largest of 1, 2 or 5
    times a power of ten that leaves 99 % of the values below white; 1 where there is no difference at all."""
    difference = (a.float() - b.float()).abs() / 2
    bright = difference.flatten().sort().values[int(0.99 * (difference.numel() - 1))].item() or difference.max().item()
    room = max(1.0, 1 / bright) if bright else 1.0
    power = 10.0 ** math.floor(math.log10(room))
    factor = power * max(step for step in (1, 2, 5) if step * power <= room)
    return (difference * factor).clamp(0, 1) * 2 - 1, factor


def mark_seams(images: torch.Tensor, rows: Sequence[int], columns: Sequence[int]) -> torch.Tensor:
    """Pictures `[n,3,H,W]` with an orange tick at both ends of every seam: one lies before each of `rows` and `columns`."""
    marked = images.clone()
    orange = torch.tensor([1.0, 0.1, -1.0], device=images.device)[:, None, None]
    for dim, seams in ((-2, rows), (-1, columns)):
        length, across = max(1, images.shape[-3 - dim] // 16), max(1, images.shape[dim] // 256)
        for seam in seams:
            line = marked.narrow(dim, max(0, seam - across), min(2 * across, images.shape[dim] - seam + across))
            for start in (0, images.shape[-3 - dim] - length):
                line.narrow(-3 - dim, start, length)[:] = orange
    return marked


def panel_size(columns: int, rows: int, tile: int, aspect: float = 1.0) -> tuple[int, int]:
    """Width and height in pixels of a panel of `rows` by `columns` tiles, each `tile` wide and `tile * aspect` high."""
    width = _LABEL_WIDTH + columns * (tile + _GAP) + _GAP
    return width, _TITLE_HEIGHT + rows * (round(tile * aspect) + _GAP) + _CAPTION_HEIGHT


def panel(
    columns: Sequence[tuple[str, torch.Tensor]], path: Path, row_titles: Sequence[str], caption: str, tile: int = 256
) -> None:
    """Writes the PNG. Each column is a title and images `[rows,3,H,W]` in [-1, 1]; all columns have one shape."""
    shape = columns[0][1].shape
    for title, images in columns:
        if images.shape != shape or images.dim() != 4 or images.shape[:2] != (len(row_titles), 3):
            expected = f"[{len(row_titles)},3,H,W], the same in every column"
            raise ValueError(f"column {title!r} has shape {tuple(images.shape)}; expected {expected}")
    height, width = shape[-2:]
    size = (tile, round(tile * height / width))
    canvas = Image.new("RGB", panel_size(len(columns), len(row_titles), tile, height / width), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    title_font, small_font = ImageFont.load_default(19), ImageFont.load_default(16)

    for c, (title, images) in enumerate(columns):
        left = _LABEL_WIDTH + c * (tile + _GAP)
        draw.text((left + tile / 2, _TITLE_HEIGHT / 2), title, fill=_INK, font=title_font, anchor="mm")
        pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for r, picture in enumerate(pixels):
            top = _TITLE_HEIGHT + r * (size[1] + _GAP)
            canvas.paste(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS), (left, top))
            if c == 0:
                at = (_LABEL_WIDTH - _GAP, top + size[1] / 2)
                draw.multiline_text(at, row_titles[r], fill=_INK, font=small_font, anchor="rm", align="right")
    draw.text((_LABEL_WIDTH, canvas.height - _CAPTION_HEIGHT / 2), caption, fill=_QUIET, font=small_font, anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, format="PNG")
