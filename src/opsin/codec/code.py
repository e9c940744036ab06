"""``ImageCode``: one vector per image, and what is needed to make images of them again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from opsin.codec.canvas import CodecFit
from opsin.errors import IncompatibleModel, InputError, InvalidCheckpoint
from opsin.geometry import Size
from opsin.hub import atomic_path, check_file

FORMAT = "opsin.image_code"


@dataclass(frozen=True, eq=False)
class ImageCode:
    """The codes of ``B`` images.

    ``vectors (B, D)``, floating, or int8 with a factor for each in ``scales (B,)``; ``model`` that made them: others
    cannot read them; ``sizes`` the original ``(H, W)`` of each; ``fit`` how they were laid on the model's canvas;
    ``names`` of the images, where they have some; ``loss`` what :meth:`half` or :meth:`int8` cost: the root of the mean
    squared error over that of the mean square of the vectors.
    """

    vectors: Tensor
    model: str
    sizes: tuple[Size, ...]
    fit: CodecFit = "stretch"
    names: tuple[str, ...] = ()
    scales: Tensor | None = None
    loss: float = 0.0

    def __post_init__(self) -> None:
        vectors = self.vectors
        if self.fit not in ("stretch", "pad", "crop"):
            raise InputError('ImageCode.fit is "stretch", "pad" or "crop"', got=self.fit)
        if vectors.ndim != 2:
            raise InputError("ImageCode.vectors has shape (B, D)", got=tuple(vectors.shape))
        if vectors.dtype == torch.int8:
            if self.scales is None or tuple(self.scales.shape) != (len(vectors),):
                raise InputError("int8 codes have one scale for each image", got=self.scales)
        elif not vectors.is_floating_point() or self.scales is not None:
            raise InputError("Codes are floating, or int8 with scales", got=vectors.dtype)
        for tensor in (vectors, self.scales):
            if tensor is not None and not bool(torch.isfinite(tensor.float()).all()):
                raise InputError("Codes are finite numbers", got="NaN or infinity")
        if len(self.sizes) != len(vectors):
            raise InputError(f"{len(vectors)} codes have as many image sizes", got=len(self.sizes))
        if any(len(size) != 2 or min(size) < 1 for size in self.sizes):
            raise InputError("Image sizes are (H, W), at least one pixel", got=self.sizes[:3])
        if self.names and len(self.names) != len(vectors):
            raise InputError(f"{len(vectors)} codes have as many names, or none", got=len(self.names))

    def __len__(self) -> int:
        """Number of images ``B``."""
        return len(self.vectors)

    @property
    def dim(self) -> int:
        """Width ``D`` of a code."""
        return int(self.vectors.shape[1])

    @property
    def bytes_per_image(self) -> int:
        """What one code takes, its scale included."""
        scale = 0 if self.scales is None else self.scales.element_size()
        return self.dim * self.vectors.element_size() + scale

    def floats(self) -> Tensor:
        """The vectors as ``(B, D)`` floating numbers, at least float32."""
        if self.scales is not None:
            return self.vectors.float() * self.scales.float()[:, None]
        return self.vectors.to(torch.promote_types(self.vectors.dtype, torch.float32))

    def half(self) -> ImageCode:
        """In float16: half the bytes; about 0.0002 of the vectors' size is lost (``loss``)."""
        exact = self.floats()
        return self._rounded(exact, exact.clamp(-65504, 65504).half(), None)

    def int8(self) -> ImageCode:
        """In 255 steps from the largest value of each vector to its negative: a quarter of the bytes.

        What is lost depends on how far the largest value stands out: ``loss`` tells.
        """
        exact = self.floats()
        scales = (exact.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny).float()
        steps = (exact / scales[:, None].to(exact.dtype)).round().clamp(-127, 127).to(torch.int8)
        return self._rounded(exact, steps, scales)

    def _rounded(self, exact: Tensor, vectors: Tensor, scales: Tensor | None) -> ImageCode:
        found = replace(self, vectors=vectors, scales=scales, loss=0.0)
        total = float(exact.double().square().sum())
        lost = float((found.floats().double() - exact.double()).square().sum())
        now = (lost / total) ** 0.5 if total else 0.0
        return replace(found, loss=(self.loss**2 + now**2) ** 0.5)

    def select(self, rows: slice | list[int]) -> ImageCode:
        """The codes of some images, in that order."""
        index = list(range(len(self)))[rows] if isinstance(rows, slice) else rows
        return replace(
            self,
            vectors=self.vectors[index],
            scales=None if self.scales is None else self.scales[index],
            sizes=tuple(self.sizes[i] for i in index),
            names=tuple(self.names[i] for i in index) if self.names else (),
        )

    @classmethod
    def join(cls, parts: Sequence[ImageCode]) -> ImageCode:
        """Codes of one model, precision and fit as one, all or none with names; else ``IncompatibleModel``."""
        kinds = {(part.model, part.fit, part.vectors.dtype, part.dim, bool(part.names)) for part in parts}
        if len(kinds) != 1:
            rule = "Codes to join are of one model, precision and fit, and all have names or none has"
            raise IncompatibleModel(rule, got=f"{len(kinds)} kinds")
        scales = [part.scales for part in parts if part.scales is not None]
        return replace(
            parts[0],
            vectors=torch.cat([part.vectors for part in parts]),
            scales=torch.cat(scales) if scales else None,
            sizes=tuple(size for part in parts for size in part.sizes),
            names=tuple(name for part in parts for name in part.names),
            loss=max(part.loss for part in parts),
        )

    def check_model(self, name: str, dim: int) -> None:
        """``IncompatibleModel`` unless the model ``name``, of width ``dim``, made these codes."""
        if self.model != name or self.dim != dim:
            raise IncompatibleModel(
                f"Codes that {name} made, {dim} wide", got=f"codes of {self.model}, {self.dim} wide",
                remedy=f'Decode them with "{self.model}".',
            )  # fmt: skip

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, by rename."""
        from safetensors.torch import save_file

        path = Path(path)
        tensors = {"vectors": self.vectors, "sizes": torch.tensor(self.sizes, dtype=torch.int32).reshape(-1, 2)}
        if self.scales is not None:
            tensors["scales"] = self.scales
        facts = {
            "format": FORMAT, "model": self.model, "fit": self.fit, "loss": repr(self.loss),
            "names": json.dumps(self.names, ensure_ascii=False),
        }  # fmt: skip
        with atomic_path(path) as temporary:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=facts)
        return path

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> ImageCode:
        """Read what :meth:`save` wrote. ``MissingFile``, ``InvalidCheckpoint`` for any other file."""
        from safetensors import SafetensorError, safe_open

        path = check_file(path)
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                facts = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            if facts.get("format") != FORMAT:
                raise InvalidCheckpoint("A file of image codes", got=f"{path}, which holds something else")
            sizes = tuple((int(h), int(w)) for h, w in tensors["sizes"].tolist())
            names = tuple(str(name) for name in json.loads(facts["names"]))
            return cls(
                tensors["vectors"], facts["model"], sizes, facts["fit"], names, tensors.get("scales"),
                float(facts["loss"]),
            )  # fmt: skip
        except InputError as error:
            raise InvalidCheckpoint("A file of image codes is sound", got=f"{path} ({error})") from error
        except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
            raise InvalidCheckpoint("A file of image codes must be whole", got=f"{path} ({error})") from error
