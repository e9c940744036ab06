"""Stage 6: tokens of the track join the query, so that the next search knows more views of the object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from opsin.errors import InvalidConfig, InvalidImage, InvalidPrompt
from opsin.vql.preset import Preset
from opsin.vql.sources import similarity

# Grey from RGB (ITU-R BT.601) in 2⁻¹⁵, as OpenCV has them; the published code applies them in the order of BGR.
GREY = (9798, 19235, 3735)


@dataclass(frozen=True, eq=False)
class Expansion:
    """What joins the query: ``tokens (K, D)``, and of each the ``moments (K,)``, the rows of the track it shows."""

    tokens: Tensor
    moments: Tensor

    def __len__(self) -> int:
        """Number of tokens ``K``."""
        return len(self.tokens)


def expand(
    queries: Tensor,
    tokens: Tensor,
    moments: Tensor,
    usable: Tensor,
    *,
    preset: Preset,
    most: int | None = None,
    compat: Literal["published"] | None = None,
) -> Expansion:
    """The tokens of a track that are like the query, from moments that show the object well.

    Args:
        queries: ``(Q, D)`` what was searched with.
        tokens: ``(T, D)`` of the track, any number per moment.
        moments: ``(T,)`` int64, the row of the track that each token shows.
        usable: ``(M,)`` boolean, for each row of the track: see :func:`worth_learning`.
        preset: ``expansion_threshold`` is exceeded by the cosine to the most similar query token.
        most: at most so many tokens, each next one the least like the queries and those before it: a long track has
            thousands that say the same, and every one is compared with the whole video. None: all, by moment.
        compat: ``"published"`` appends, for a token of moment ``i``, not itself but the ``i``-th token of the track, as
            the published code does, which counts moments where it should count tokens.

    Raises:
        InvalidPrompt: lengths that do not fit, moments outside the track, values that are not finite.
    """
    if compat not in (None, "published"):
        raise InvalidConfig('compat is "published" or None', got=compat)
    if most is not None and most < 0:
        raise InvalidConfig("most is at least 0", got=most)
    if moments.shape != tokens.shape[:1]:
        raise InvalidPrompt("Each token has its moment", got=f"{len(tokens)} tokens, {len(moments)} moments")
    if len(moments) and not 0 <= int(moments.min()) <= int(moments.max()) < len(usable):
        raise InvalidPrompt(f"Moments are rows of a track of {len(usable)}", got=f"{moments.min()} to {moments.max()}")
    if compat == "published" and len(tokens) < len(usable):
        raise InvalidPrompt("The published rule needs as many tokens as moments", got=f"{len(tokens)}, {len(usable)}")
    moments, usable = moments.to(tokens.device), usable.to(tokens.device).bool()
    cosines = similarity(tokens, queries).amax(-1)
    rows = ((cosines > preset.expansion_threshold) & usable[moments]).nonzero()[:, 0]
    chosen = moments[rows] if compat == "published" else rows
    shown = moments[rows]  # published: the token is another one, its moment is recorded as this
    if most is not None and len(chosen) > most:
        kept = _unlike(tokens[chosen], queries, most)
        chosen, shown = chosen[kept], shown[kept]
    return Expansion(tokens[chosen], shown)


def worth_learning(picture: Tensor, box: Tensor, preset: Preset, *, compat: Literal["published"] | None = None) -> bool:
    """Whether a frame ``(3, H, W)`` and its ``box (4,)`` teach something: large enough, and not blurred."""
    side = float((box[2:] - box[:2]).min())
    return side > preset.expansion_min_side and sharpness(picture, compat=compat) >= preset.expansion_sharpness


def sharpness(picture: Tensor, *, compat: Literal["published"] | None = None) -> float:
    """Variance of the Laplacian of ``picture (3, H, W)``, uint8 or float in [0, 1], in whole greys 0 to 255.

    Below 100 the published code calls a frame blurred; ``compat="published"`` weighs red as blue, as it does.
    """
    if picture.ndim != 3 or picture.shape[0] != 3 or 0 in picture.shape:
        raise InvalidImage("A picture has shape (3, H, W)", got=tuple(picture.shape))
    levels = (picture.float() * 255).round().long() if picture.is_floating_point() else picture.long()
    weights = levels.new_tensor(GREY[::-1] if compat == "published" else GREY)
    grey = (((levels * weights[:, None, None]).sum(0) + (1 << 14)) >> 15).double()[None, None]
    height, width = grey.shape[-2:]
    # Beyond the border the picture is mirrored at its outermost pixels, which needs two of them.
    grey = F.pad(grey, (1, 1, 0, 0), mode="reflect" if width > 1 else "replicate")
    grey = F.pad(grey, (0, 0, 1, 1), mode="reflect" if height > 1 else "replicate")
    kernel = grey.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return float(F.conv2d(grey, kernel).var(correction=0))


def _unlike(tokens: Tensor, queries: Tensor, count: int) -> Tensor:
    """Ascending rows ``(count,)``: each next one has the least cosine to the queries and the rows taken before."""
    nearest = similarity(tokens, queries).amax(-1)
    unit, taken = F.normalize(tokens, dim=-1), []
    for _ in range(count):
        taken.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, unit @ unit[taken[-1]])
        nearest[taken] = torch.inf
    return torch.tensor(sorted(taken), dtype=torch.long, device=tokens.device)
