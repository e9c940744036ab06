"""Pictures → tokens at points, and a token for a mask: what the stages know of a model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from opsin.errors import IncompatibleModel, InvalidConfig, InvalidPrompt
from opsin.geometry import ImageTransform, Size
from opsin.images import unfit
from opsin.regions.asking import spread_prompts
from opsin.regions.encoder import grid_centres
from opsin.runtime import in_batches, to_model
from opsin.types import FeatureMap

if TYPE_CHECKING:
    from opsin.regions import RegionModel
    from opsin.segmentation import Segmenter

GRID = 32  # points per side, as published


@dataclass(frozen=True, eq=False)
class PointTokens:
    """What a picture looks like at points: ``points (P, 2)`` its pixels ``(x, y)``, ``tokens (P, D)`` unit float32."""

    points: Tensor
    tokens: Tensor

    def __len__(self) -> int:
        """Number of points ``P``."""
        return len(self.points)

    def select(self, rows: Tensor) -> PointTokens:
        """The rows that an index or boolean tensor names, in that order."""
        return PointTokens(self.points[rows], self.tokens[rows])


class TokenSource(Protocol):
    """A model, as the stages see it. Pictures are ``(3, H, W)``, uint8 or float in [0, 1]; tokens come on the CPU.

    Tokens of sources of another ``name`` do not compare. A picture must not be changed in place between calls: what was
    computed of the last few is kept.
    """

    @property
    def name(self) -> str:
        """The model, and what else tokens depend on."""
        ...

    @property
    def dim(self) -> int:
        """``D``."""
        ...

    def tokens(self, pictures: Sequence[Tensor]) -> list[PointTokens]:
        """Tokens at points spread over each picture."""
        ...

    def object_tokens(self, pictures: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """Mean feature ``(K, D')`` of unit length inside each of a picture's boolean masks ``(K, H, W)``.

        The features are those behind the tokens, enlarged bilinearly to the picture. ``D'`` and the space may be others
        than those of ``tokens``: compare such tokens with each other only. Zeros for an empty mask.
        """
        ...

    def object_token(self, picture: Tensor, mask: Tensor) -> Tensor:
        """``(D',)`` of one mask ``(H, W)``."""
        return self.object_tokens([picture], [mask[None]])[0][0]


class _Recent:
    """``compute(pictures)``, not done again for the last few pictures (known by identity)."""

    def __init__(self, compute: Callable[[list[Tensor]], Sequence[Any]], count: int) -> None:
        self.compute = compute
        self.kept: deque[tuple[Tensor, Any]] = deque(maxlen=count)

    def __call__(self, pictures: Sequence[Tensor]) -> list[Any]:
        known = {id(p): found for p, found in self.kept}  # these are alive, so nobody else has their ids
        missing = list({id(p): p for p in pictures if id(p) not in known}.values())
        for picture, found in zip(missing, self.compute(missing) if missing else (), strict=True):
            known[id(picture)] = found
            self.kept.append((picture, found))
        return [known[id(p)] for p in pictures]


class RegionTokenSource(TokenSource):
    """Region tokens of ``model`` on a fixed grid of ``grid × grid`` prompts, nothing merged.

    ``size`` is the side of the square model input, by default the model's own; ``batch`` pictures go together. The
    object tokens are those of the backbone's features (REN-VQL pools another backbone's, DINO ViT-B/8, for these).
    """

    def __init__(self, model: RegionModel, grid: int = GRID, size: int | None = None, batch: int = 4) -> None:
        if grid < 1 or batch < 1:
            raise InvalidConfig("grid and batch are at least 1", got=f"grid={grid}, batch={batch}")
        self.model, self.grid, self.size, self.batch = model, grid, size or model.card.image_size, batch
        self._recent = _Recent(self._encode, 4 * batch)

    def features(self, pictures: Sequence[Tensor]) -> list[FeatureMap]:
        """The backbone's features of each picture; those of the last few are kept."""
        return self._recent(pictures)

    @property
    def name(self) -> str:
        """Name of the model, with what the tokens depend on besides."""
        return f"{self.model.name}/grid{self.grid}@{self.size}"

    @property
    def dim(self) -> int:
        """Width ``D``."""
        return self.model.dim

    @torch.inference_mode()
    def tokens(self, pictures: Sequence[Tensor]) -> list[PointTokens]:
        """``pred`` tokens at the grid's points, which are integer pixels of the model input, at their centres.

        Raises:
            InvalidImage, ResourceError.
        """

        def answer(part: Sequence[Tensor]) -> list[PointTokens]:
            maps = self.features(part)
            memory = self.model.encoder.memory(torch.stack([to_model(m.features, self.model.encoder) for m in maps]))
            asked = [spread_prompts("grid", None, m.transform, self.grid) for m in maps]
            points = torch.stack([a.points for a in asked]).to(memory.keys[0].device)
            found = self.model.encoder.decode(memory, points).pred_tokens
            unit = F.normalize(found.float(), dim=-1).cpu()
            return [PointTokens(a.original, u) for a, u in zip(asked, unit, strict=True)]

        return in_batches(answer, pictures, self.batch)

    @torch.inference_mode()
    def object_tokens(self, pictures: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """See :class:`TokenSource`. Raises ``InvalidPrompt`` for masks of another size than their picture."""

        def answer(part: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
            maps = self.features([picture for picture, _ in part])
            return [pooled(m.features.float().cpu(), m.transform, k) for m, (_, k) in zip(maps, part, strict=True)]

        return in_batches(answer, list(zip(pictures, masks, strict=True)), self.batch)

    @torch.inference_mode()
    def attention(self, picture: Tensor, points: Tensor) -> Tensor:
        """Where the model looks for ``points (P, 2)``: ``(P, H, W)``, last layer, maximum over heads, bilinear.

        The softmax runs over the cells of each head, so values are the larger the narrower the look. ``P·H·W`` numbers:
        ask for a few points.
        """
        feature_map = self.features([picture])[0]
        encoder = self.model.encoder
        memory = self.model.memory(feature_map)
        asked = feature_map.transform.normalise(points.float()).to(memory.keys[0].device)
        maps = encoder.attention(memory, asked[None])[0].float().softmax(-1).amax(0)
        return unfit(maps.unflatten(-1, memory.grid).cpu(), feature_map.transform)

    def _encode(self, pictures: list[Tensor]) -> list[FeatureMap]:
        return self.model.features(pictures, size=self.size, batch_size=self.batch)


class AlignedTokenSource(TokenSource):
    """One token per cell of a ``segmenter``'s grid, in the space of words: such a query may also be a phrase."""

    def __init__(self, segmenter: Segmenter, batch: int = 4) -> None:
        if batch < 1:
            raise InvalidConfig("batch is at least 1", got=batch)
        self.segmenter, self.batch = segmenter, batch
        self._words = _Recent(self._encode, 4 * batch)

    @property
    def name(self) -> str:
        """Name of the model."""
        return f"{self.segmenter.name}/words"

    @property
    def dim(self) -> int:
        """Width ``E`` of the space of words."""
        return self.segmenter.aligned.text_dim

    def tokens(self, pictures: Sequence[Tensor]) -> list[PointTokens]:
        """A token at the centre of every cell."""

        def answer(part: Sequence[Tensor]) -> list[PointTokens]:
            return [
                PointTokens(grid_centres(_grid(w)) * torch.tensor((p.shape[2], p.shape[1])), w.flatten(1).T)
                for p, w in zip(part, self._words(part), strict=True)
            ]

        return in_batches(answer, pictures, self.batch)

    def object_tokens(self, pictures: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """See :class:`TokenSource`; these are in the space of words too, and compare with ``tokens``."""

        def answer(part: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
            cells = self._words([picture for picture, _ in part])
            return [pooled(w, _stretched(p, w), chosen) for (p, chosen), w in zip(part, cells, strict=True)]

        return in_batches(answer, list(zip(pictures, masks, strict=True)), self.batch)

    def words(self, phrases: Sequence[str], *, templates: str | Sequence[str] | None = "imagenet") -> Tensor:
        """Unit vectors ``(Q, E)``, one per phrase. Raises ``InvalidPrompt`` for blank or repeated phrases."""
        from opsin.segmentation.labels import as_labels

        return F.normalize(self.segmenter.embed(as_labels(list(phrases), templates=templates)).float(), dim=-1).cpu()

    def _encode(self, pictures: list[Tensor]) -> list[Tensor]:
        return [encoded.words.float().cpu() for encoded in self.segmenter.encode(pictures)]


def similarity(tokens: Tensor, queries: Tensor) -> Tensor:
    """Cosines ``(N, Q)`` of ``tokens (N, D)`` and ``queries (Q, D)``; 0 for a token of zeros.

    Raises:
        IncompatibleModel: widths differ. InvalidPrompt: no query, or values that are not finite.
    """
    if tokens.ndim != 2 or queries.ndim != 2 or tokens.shape[1] != queries.shape[1]:
        raise IncompatibleModel(
            "Tokens and queries have shapes (N, D) and (Q, D)", got=f"{tuple(tokens.shape)} and {tuple(queries.shape)}"
        )
    if len(queries) == 0:
        raise InvalidPrompt("There is at least one query token", got="none")
    # Norms divide the products, so the tokens, of which a video has many, are only read.
    norms = tokens.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    cosines = tokens @ F.normalize(queries.to(tokens), dim=-1).T / norms
    if not bool(torch.isfinite(cosines).all()):
        raise InvalidPrompt("Tokens are finite numbers", got="NaN or infinity")
    return cosines


def matching(tokens: Tensor, queries: Tensor, threshold: float) -> Tensor:
    """Rows ``(K,)`` of ``tokens (N, D)`` whose best cosine to a query is above ``threshold``, ascending; where none is,
    the one best row. Source: the REN wrapper of REN-VQL."""
    best = similarity(tokens, queries).amax(-1)
    rows = (best > threshold).nonzero()[:, 0]
    return rows if len(rows) or not len(best) else best.argmax()[None]


def pooled(features: Tensor, transform: ImageTransform, masks: Tensor) -> Tensor:
    """Unit mean ``(K, D)`` of ``features (D, h, w)``, enlarged bilinearly to the picture, in ``masks (K, H, W)``.

    Nothing is enlarged: each mask is summed with the weights that its pixels give to the cells, which is the same mean.
    """
    if masks.ndim != 3 or tuple(masks.shape[1:]) != transform.size:
        raise InvalidPrompt(f"Masks have shape (K, {transform.size[0]}, {transform.size[1]})", got=tuple(masks.shape))
    rows, columns = _shares(transform, _grid(features))
    shares = rows @ masks.to(features) @ columns.T
    return F.normalize(shares.flatten(1) @ features.flatten(1).T, dim=-1)


def _shares(transform: ImageTransform, grid: Size) -> tuple[Tensor, Tensor]:
    """What bilinear enlargement gives of each cell to each pixel, along ``y (h, H)`` and ``x (w, W)``."""

    def axes() -> Iterator[Tensor]:
        for axis in (0, 1):
            pixels = torch.arange(transform.size[axis]) + 0.5
            canvas = pixels * transform.scale[1 - axis] + transform.offset[1 - axis]
            at = (canvas / transform.canvas[axis] * grid[axis] - 0.5).clamp(0, grid[axis] - 1)
            yield (1 - (at - torch.arange(grid[axis])[:, None]).abs()).clamp(min=0)

    y, x = axes()
    return y, x


def _grid(cells: Tensor) -> Size:
    return int(cells.shape[1]), int(cells.shape[2])


def _stretched(picture: Tensor, cells: Tensor) -> ImageTransform:
    """From the pixels of a picture to cells ``(E, h, w)`` that cover it."""
    size, grid = _grid(picture), _grid(cells)
    return ImageTransform(size, grid, (grid[1] / size[1], grid[0] / size[0]))
