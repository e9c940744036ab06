"""Stage 1: which tokens stand for an object that is shown by masks, one in each picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opsin.errors import IncompatibleModel, InvalidPrompt
from opsin.vql.sources import PointTokens


@dataclass(frozen=True, eq=False)
class Chosen:
    """What an object looks like: ``tokens (T, D)``, and the picture ``pictures (T,)`` that each comes from.

    Pictures that gave no token are missing, so tokens are never counted to tell whose they are.
    """

    tokens: Tensor
    pictures: Tensor

    def __len__(self) -> int:
        """Number of tokens ``T``."""
        return len(self.tokens)


def deepest(mask: Tensor, points: Tensor) -> int | None:
    """Which of ``points (P, 2)`` lies deepest inside a mask ``(H, W)``; None when none is inside. The first on ties.

    Depth is the distance to the nearest pixel outside the mask, exact here and by OpenCV's 5 × 5 approximation in the
    published code: the choices on its examples are the same. An object may go on beyond the border of the picture, so
    that is no edge; but a mask of the whole picture has no other, and then the border counts (published: the first
    point).
    """
    from scipy.ndimage import distance_transform_edt

    if mask.ndim != 2 or points.ndim != 2 or points.shape[-1] != 2:
        raise InvalidPrompt("Shapes are mask (H, W), points (P, 2)", got=f"{tuple(mask.shape)}, {tuple(points.shape)}")
    if not bool(torch.isfinite(points).all()):
        raise InvalidPrompt("Points are finite", got="NaN or infinity")
    inside = mask.cpu().numpy().astype(bool)
    if not len(points) or not inside.any():
        return None
    if inside.all():
        inside = torch.nn.functional.pad(torch.from_numpy(inside), (1, 1, 1, 1)).numpy()
        depth = torch.from_numpy(distance_transform_edt(inside))[1:-1, 1:-1]
    else:
        depth = torch.from_numpy(distance_transform_edt(inside))
    x, y = points.cpu().floor().long().unbind(-1)
    depths = depth[y.clamp(0, mask.shape[0] - 1), x.clamp(0, mask.shape[1] - 1)]
    return int(depths.argmax()) if bool(depths.max() > 0) else None


def choose(
    mask: Tensor, points: Tensor, tokens: Tensor, *, compat: Literal["published"] | None = None
) -> Tensor | None:
    """The token ``(D,)`` of the object in ``mask (H, W)``: that of the deepest of ``points (P, 2)`` inside.

    None for an empty mask, and when no point is inside; ``compat="published"`` gives zeros in the latter case, and the
    first token for a mask of the whole picture.

    Raises:
        InvalidPrompt: wrong shapes, points that are not finite. IncompatibleModel: not one token per point.
    """
    if tokens.ndim != 2 or len(tokens) != len(points):
        raise IncompatibleModel("There is one token per point", got=f"{tuple(tokens.shape)} for {len(points)} points")
    if compat == "published" and len(points) and bool(mask.bool().all()):
        return tokens[0]
    at = deepest(mask, points)
    if at is None and compat == "published" and bool(mask.any()):
        return tokens.new_zeros(tokens.shape[1])
    return None if at is None else tokens[at]


def choose_each(
    masks: Sequence[Tensor], found: Sequence[PointTokens], *, compat: Literal["published"] | None = None
) -> Chosen:
    """The token of the object in each picture, from its ``masks`` and what was ``found`` there; see :func:`choose`."""
    chosen = [choose(m, f.points, f.tokens, compat=compat) for m, f in zip(masks, found, strict=True)]
    kept = [i for i, token in enumerate(chosen) if token is not None]
    dim = found[0].tokens.shape[1] if found else 0
    tokens = [token for token in chosen if token is not None]
    return Chosen(torch.stack(tokens) if tokens else torch.zeros((0, dim)), torch.tensor(kept, dtype=torch.long))
