"""From anything a person calls an image to ``(3, H, W)`` RGB float in [0, 1], and onto a model's canvas and back.

EXIF orientation is applied; grey, 16-bit, palette, CMYK and RGBA become RGB (alpha is dropped, the colours below it
stay); of an animation the first frame is taken.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from opsin.errors import InvalidConfig, InvalidImage, MissingFile, UnsupportedSize
from opsin.geometry import ImageTransform, Size

ImageSource = str | Path | bytes | Image.Image | np.ndarray | Tensor
Fit = Literal["stretch", "pad"]

MAX_PIXELS = 200_000_000
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}


def read_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """One image as ``(3, H, W)`` float32 RGB in [0, 1].

    ``source``: a path, encoded bytes, a PIL image, an array ``(H, W)`` or ``(H, W, 1|3|4)`` (uint8, uint16, or float
    in [0, 1]), or a tensor ``(1|3|4, H, W)`` of the same types. Raises ``MissingFile`` or ``InvalidImage``;
    ``max_pixels`` guards against decompression bombs and is checked before any pixel is decoded.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.exists():
            raise MissingFile("The image file must exist", got=str(path))
        if path.is_dir():
            raise InvalidImage(
                "One image is wanted here", got=f"the folder {path}", remedy="read_images takes folders."
            )
        return _decode(path.read_bytes(), str(path), max_pixels)
    if isinstance(source, bytes):
        return _decode(source, "bytes", max_pixels)
    if isinstance(source, Image.Image):
        _check_pixels(source.size, max_pixels, "a PIL image")
        return _from_pil(source)
    if isinstance(source, Tensor):
        return _from_channels_first(source)
    if isinstance(source, np.ndarray):
        return _from_channels_last(source)
    raise InvalidImage("An image is a path, bytes, PIL image, array or tensor", got=type(source).__name__)


def read_images(sources: ImageSource | Sequence[ImageSource]) -> list[Tensor]:
    """A list of images ``(3, H, W)``: from one source, a list of sources, a batch ``(B, C, H, W)``, or a folder."""
    if isinstance(sources, (str, Path)) and Path(sources).is_dir():
        paths = list_images(sources)
        if not paths:
            raise InvalidImage("The folder must hold at least one image", got=str(sources))
        return [read_image(p) for p in paths]
    if isinstance(sources, Tensor) and sources.ndim == 4:
        return [read_image(s) for s in sources]
    if isinstance(sources, (list, tuple)):
        return [read_image(s) for s in sources]
    return [read_image(sources)]  # type: ignore[arg-type]


def list_images(folder: str | Path) -> list[Path]:
    """The image files below ``folder``, sorted, hidden ones left out."""
    root = Path(folder)
    if not root.is_dir():
        raise MissingFile("The folder must exist", got=str(root))
    files = (p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    return sorted(p for p in files if p.is_file())


def _check_pixels(size: tuple[int, int], max_pixels: int, name: str) -> None:
    if size[0] * size[1] > max_pixels:
        raise InvalidImage(
            f"An image has at most {max_pixels:,} pixels",
            got=f"{size[0]}×{size[1]} in {name}",
            remedy="Raise max_pixels if you trust it.",
        )


def _decode(data: bytes, name: str, max_pixels: int) -> Tensor:
    if not data:
        raise InvalidImage("An image file must not be empty", got=f"0 bytes in {name}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is stricter, and typed
            with Image.open(io.BytesIO(data)) as image:
                _check_pixels(image.size, max_pixels, name)
                image.load()
                return _from_pil(image)
    except UnidentifiedImageError as error:
        raise InvalidImage("The file must be an image that Pillow can read", got=name) from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        if isinstance(error, InvalidImage):
            raise
        raise InvalidImage("The image must be whole and undamaged", got=f"{name} ({error})") from error


def _from_pil(image: Image.Image) -> Tensor:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_channels_last(np.asarray(image).astype(np.uint16) if image.mode != "F" else np.asarray(image))
    return _from_channels_last(np.asarray(image.convert("RGB")))


def _to_unit(array: Tensor) -> Tensor:
    """Integers by their full range, floats as they are, checked to lie in [0, 1]."""
    if array.dtype == torch.bool:
        return array.float()
    if not array.dtype.is_floating_point:
        return array.float().div_({torch.uint8: 255.0, torch.uint16: 65535.0}.get(array.dtype, 255.0))
    array = array.float()
    if array.numel() and not (
        bool(torch.isfinite(array).all()) and float(array.min()) >= -1e-3 and float(array.max()) <= 1 + 1e-3
    ):
        raise InvalidImage("Float images lie in [0, 1]", got=f"values from {array.min():.3g} to {array.max():.3g}")
    return array.clamp(0, 1)


def _from_channels_first(tensor: Tensor) -> Tensor:
    if tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4) or 0 in tensor.shape:
        raise InvalidImage("An image tensor has shape (1|3|4, H, W)", got=tuple(tensor.shape))
    return _to_unit(tensor)[:3].expand(3, -1, -1).contiguous()


def _from_channels_last(array: np.ndarray) -> Tensor:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise InvalidImage("An image array has shape (H, W) or (H, W, 1|3|4)", got=array.shape)
    if array.dtype.kind not in "uifb":
        raise InvalidImage("An image array holds numbers", got=array.dtype)
    return _from_channels_first(torch.from_numpy(np.array(array)).permute(2, 0, 1))


def to_pil(image: Tensor) -> Image.Image:
    """``(3, H, W)`` in [0, 1] as a PIL image."""
    array = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


def save_image(image: Tensor | Image.Image, path: str | Path) -> Path:
    """Write a PIL image or ``(3, H, W)`` in [0, 1] to ``path``; the suffix names the format."""
    path = Path(path)
    if path.suffix.lower() not in Image.registered_extensions():
        raise InvalidConfig(
            "A picture's suffix names a format that Pillow writes", got=path.name, remedy="Use .png or .jpg."
        )
    picture = to_pil(image) if isinstance(image, Tensor) else image
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        picture.save(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def resize(image: Tensor, size: Size) -> Tensor:
    """``(C, H, W)`` → ``(C, *size)``: bilinear with antialiasing, as REN's training and video code do."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]


def fit(image: Tensor, canvas: Size, mode: Fit = "stretch") -> tuple[Tensor, ImageTransform]:
    """Lay ``(C, H, W)`` onto a canvas ``(H', W')``: ``"stretch"`` ignores the aspect (REN §3), ``"pad"`` keeps it.

    Returns the canvas ``(C, H', W')``, padding zero and centred, and the transform that leads back.
    """
    height, width = image.shape[-2:]
    if mode == "stretch":
        scale = (canvas[1] / width, canvas[0] / height)
        return resize(image, canvas), ImageTransform((height, width), canvas, scale)
    if mode != "pad":
        raise InvalidConfig('fit is "stretch" or "pad"', got=mode)
    ratio = min(canvas[0] / height, canvas[1] / width)
    inner = max(1, round(height * ratio)), max(1, round(width * ratio))
    left, top = (canvas[1] - inner[1]) // 2, (canvas[0] - inner[0]) // 2
    padded = F.pad(resize(image, inner), (left, canvas[1] - inner[1] - left, top, canvas[0] - inner[0] - top))
    return padded, ImageTransform((height, width), canvas, (inner[1] / width, inner[0] / height), (left, top))


def pad_to_multiple(image: Tensor, multiple: int) -> tuple[Tensor, ImageTransform]:
    """Centre-pad ``(C, H, W)`` with zeros up to a multiple; left and top get the smaller half (REN §3)."""
    height, width = image.shape[-2:]
    extra_h, extra_w = -height % multiple, -width % multiple
    left, top = extra_w // 2, extra_h // 2
    padded = F.pad(image, (left, extra_w - left, top, extra_h - top))
    return padded, ImageTransform((height, width), (height + extra_h, width + extra_w), offset=(left, top))


def unfit(maps: Tensor, transform: ImageTransform, *, nearest: bool = False) -> Tensor:
    """Maps ``(C, h, w)`` over a canvas → ``(C, H, W)`` over the original pixels: padding dropped, size restored.

    Every original pixel centre is looked up in the map, so fractional offsets and strides stay exact.
    """
    height, width = transform.size
    ys = torch.arange(height, device=maps.device, dtype=torch.float32) + 0.5
    xs = torch.arange(width, device=maps.device, dtype=torch.float32) + 0.5
    v = (ys * transform.scale[1] + transform.offset[1]) / transform.canvas[0] * 2 - 1
    u = (xs * transform.scale[0] + transform.offset[0]) / transform.canvas[1] * 2 - 1
    lookup = torch.stack(torch.meshgrid(u, v, indexing="xy"), -1)[None].to(maps.dtype)
    mode = "nearest" if nearest else "bilinear"
    return F.grid_sample(maps[None], lookup, mode=mode, padding_mode="border", align_corners=False)[0]


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """First pixels of windows that cover ``length``; the last one is moved inside, so no window leaves the image."""
    if not 0 <= overlap < 1:
        raise InvalidConfig("overlap lies in [0, 1)", got=overlap)
    if length <= window:
        return [0]
    stride = max(1, int(window * (1 - overlap)))
    return [*range(0, length - window, stride), length - window]


def tile(image: Tensor, window: Size, overlap: float = 0.25) -> tuple[Tensor, list[tuple[int, int]]]:
    """Cut ``(C, H, W)``, at least one window large, into windows ``(N, C, *window)`` at ``(top, left)`` starts."""
    height, width = image.shape[-2:]
    if height < window[0] or width < window[1]:
        raise UnsupportedSize(
            f"An image to tile is at least {window[1]}×{window[0]}", got=f"{width}×{height}", remedy="Pad it first."
        )
    starts = [
        (y, x) for y in window_starts(height, window[0], overlap) for x in window_starts(width, window[1], overlap)
    ]
    return torch.stack([image[:, y : y + window[0], x : x + window[1]] for y, x in starts]), starts


def stitch(windows: Tensor, starts: Sequence[tuple[int, int]], size: Size) -> Tensor:
    """Windows ``(N, C, wh, ww)`` at ``(top, left)`` starts → ``(C, *size)``; overlaps are averaged. Undoes ``tile``."""
    total = windows.new_zeros((windows.shape[1], *size))
    count = windows.new_zeros(size)
    for window, (y, x) in zip(windows, starts, strict=True):
        total[:, y : y + window.shape[1], x : x + window.shape[2]] += window
        count[y : y + window.shape[1], x : x + window.shape[2]] += 1
    return total / count.clamp(min=1)
