"""Every threshold of the five stages, under one name."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from opsin.errors import InvalidConfig, near_misses

EIGHT = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75)


@dataclass(frozen=True)
class Preset:
    """What the stages are run with. Scores and similarities are cosines in [-1, 1], factors ratios of sides.

    Query (1) and video (2): ``query_factors`` magnifications at which the object is looked at, around its box;
    ``video_factors`` magnifications of the tiles of every frame, 1 the frame itself, 2 its quarters;
    ``video_overlap`` share by which tiles overlap; ``match_threshold`` least similarity of a video token to keep,
    besides each picture's best.

    Selection (3): ``suppression`` frames before the query are left out for as long as they score this much: they show
    the moment of the query itself; ``nms`` neighbours of a peak go while they score above this share of it; ``top_k``
    most candidates; ``top_p`` least score, or the best score where that is lower; ``top_share`` least share of the best
    score.

    Refinement (4): ``refine`` whether candidates are looked at again, enlarged; ``crop_margin`` the crop around a box
    is this many times its size, ``crop_limits`` least and largest magnification of it; ``refinement_top_p`` least
    score after refinement, or the best where that is lower.

    Tracking (5): ``first`` whether the best candidate is tracked or the last one; ``threshold`` least score of an
    answer, below which nothing is found; ``window`` frames followed at most each way.

    Expansion (6): ``expansion_frames`` frames of the track that are looked at, at most; ``expansion_threshold``
    similarity to the query above which tokens of the track join it; ``expansion_min_side`` pixels that the box's
    shorter side must exceed; ``expansion_sharpness`` least variance of the Laplacian of the frame, grey in [0, 255].

    Second round (7): ``second_threshold`` least refined score of a later occurrence; ``second_share`` share of the
    first track's score that it must exceed. ``rounds`` of search at most, 1 leaves expansion out.
    """

    name: str = "ren-vql"
    query_factors: tuple[float, ...] = EIGHT
    video_factors: tuple[float, ...] = (1.0, 2.0)
    video_overlap: float = 0.0
    match_threshold: float = 0.6
    suppression: float = 0.8
    nms: float = 0.8
    top_k: int = 25
    top_p: float = 0.7
    top_share: float = 0.0
    refine: bool = True
    crop_margin: float = 1.5
    crop_limits: tuple[float, float] = (1.0, 2.0)
    refinement_top_p: float = 0.7
    first: Literal["best", "last"] = "best"
    threshold: float = 0.6
    window: int = 500
    expansion_frames: int = 24
    expansion_threshold: float = 0.5
    expansion_min_side: float = 10.0
    expansion_sharpness: float = 100.0
    second_threshold: float = 0.7
    second_share: float = 0.7
    rounds: int = 2

    def __post_init__(self) -> None:
        for name in ("query_factors", "video_factors", "crop_limits"):
            values = tuple(float(v) for v in getattr(self, name))
            object.__setattr__(self, name, values)
            if not values or not all(1 <= v < float("inf") for v in values):
                raise InvalidConfig(f"{name} are one or more finite magnifications of at least 1", got=values)
        if len(self.crop_limits) != 2 or self.crop_limits[0] > self.crop_limits[1]:
            raise InvalidConfig("crop_limits are the least and the largest magnification", got=self.crop_limits)
        if len(set(self.video_factors)) < len(self.video_factors):
            raise InvalidConfig("video_factors differ from each other", got=self.video_factors)
        for name in ("match_threshold", "suppression", "top_p", "refinement_top_p", "expansion_threshold",
                     "second_threshold"):  # fmt: skip
            self._within(name, -1, 1)
        for name in ("nms", "second_share", "top_share"):
            self._within(name, 0, 1)
        for name in ("expansion_min_side", "expansion_sharpness"):
            self._within(name, 0, float("inf"))
        self._within("threshold", float("-inf"), float("inf"))
        if self.first not in ("best", "last"):
            raise InvalidConfig('first is "best" or "last"', got=self.first)
        if not 0 <= self.video_overlap < 1:
            raise InvalidConfig("video_overlap lies in [0, 1)", got=self.video_overlap)
        if not 1 <= self.crop_margin < float("inf"):
            raise InvalidConfig("crop_margin is a finite number of at least 1", got=self.crop_margin)
        for name in ("top_k", "window", "rounds", "expansion_frames"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InvalidConfig(f"{name} is a whole number of at least 1", got=value)

    def _within(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not low <= value <= high:  # NaN is not
            raise InvalidConfig(f"{name} lies in [{low:g}, {high:g}]", got=value)


# Source: the configuration of the published REN-VQL, and the two values fixed in its code (match_threshold,
# suppression). A refinement_min_score of 0.6 stands there as well, but nothing in it reads that, so that it always
# finds something; here it is the threshold of an answer, and threshold=-1 is what the published code does. It
# also expands by every frame of a track.
#
# "template": measured with opsin-tiny on 18 episodes cut from 6 tracking videos (a crop as query, 5 frames a second),
# and on the same films without the frames of the object's own video. Threshold: found with the object there; "found"
# without it. 0.2: 17; 11. 0.25: 17; 9. 0.3: 11; 7. 0.4: 8; 5. 0.45: 5; 3. 0.5: 3; 0. At 0.25 the two differ most; who
# must not be misled takes 0.5. A later occurrence needs 0.55 of the best score. Further rounds, each above 0.3:
# stAP@0.25 .098 → .139, tAP@0.25 .114 → .445. Chosen on these very films, so expect somewhat worse elsewhere.
#
# "words": a score is the probability of the words beside "object", "things", "stuff", "texture"; half is indifference.
PRESETS = {
    "ren-vql": Preset(),
    "template": Preset("template", top_p=-1, top_share=0.55, refine=False, first="last", threshold=0.25, rounds=4,
                       second_threshold=0.3, second_share=0.55),
    "words": Preset("words", suppression=1, top_p=-1, top_share=0.9, refinement_top_p=0, first="last", threshold=0.5,
                    rounds=1),
}  # fmt: skip


def preset(name: str | Preset = "ren-vql", **overrides: Any) -> Preset:
    """A preset by name (or as it is), with some values replaced: ``preset("ren-vql", top_k=10)``.

    Raises:
        InvalidConfig: no such preset, no such value, or a value outside its range.
    """
    if isinstance(name, Preset):
        base = name
    elif name in PRESETS:
        base = PRESETS[name]
    else:
        raise InvalidConfig(
            f"A preset is one of {', '.join(PRESETS)}", got=f'"{name}"', remedy=near_misses(str(name), PRESETS)
        )
    known = [f.name for f in fields(Preset)]
    for key in overrides:
        if key not in known:
            remedy = near_misses(key, known) or f"It has {', '.join(known)}."
            raise InvalidConfig(f'The preset "{base.name}" has no value of that name', got=f'"{key}"', remedy=remedy)
    return replace(base, **overrides)
