"""SAM 2 through a video: from a box on one frame to a box on every frame, both ways. Ravi et al. (2024), 2408.00714.

The inference session of ``transformers`` is driven frame by frame. It keeps what the network still looks at: the seed
and the last few frames, in whatever length of video.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opsin.errors import InvalidConfig
from opsin.geometry import mask_boxes
from opsin.tracking.base import Step
from opsin.tracking.follow import backwards, check_seed, forwards, join, size_at
from opsin.tracking.sam2 import DEFAULT, Sam2Masks, full_size, load_model, prepare
from opsin.video import VideoFrame, VideoReader

if TYPE_CHECKING:
    from transformers import Sam2VideoModel

WINDOW = 500  # frames each way, as published


class Sam2Tracker:
    """``opsin.tracking.base.Tracker`` by SAM 2 or 2.1. Build it with :meth:`from_pretrained`.

    A step's score is the probability that the object is visible. ``masks`` makes masks with the same weights.
    """

    def __init__(
        self, model: Sam2VideoModel, *, name: str = "sam2", window: int = WINDOW, offload: bool = False
    ) -> None:
        if window < 1:
            raise InvalidConfig("A window has at least one frame", got=window)
        self.masks = Sam2Masks(model, name=name)
        self.model: Any = model
        self.name, self.window, self.offload = name, window, offload

    @classmethod
    def from_pretrained(
        cls,
        ref: str | Path = DEFAULT,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        window: int = WINDOW,
        offload: bool = False,
    ) -> Sam2Tracker:
        """With the weights of a catalogue name, ``"hf:org/repo@revision"``, ``"dir:path"`` or a folder.

        Args:
            ref: a SAM 2 with its memory, ``model_type`` sam2_video, as all of the catalogue are.
            device, dtype: as everywhere; ``"auto"`` is bfloat16 where the hardware has it, as published.
            window: frames followed at most, each way.
            offload: keep what is remembered of frames in the memory of the host instead of that of the device: 25 MB in
                float32, however long the video.

        Raises:
            UnknownModel, ModelUnavailable, MissingFile, InvalidConfig (not a SAM 2 of videos), InvalidCheckpoint.
        """
        model = load_model(ref, "Sam2VideoModel", device, dtype)
        return cls(model, name=str(ref), window=window, offload=offload)

    @torch.inference_mode()
    def track(self, reader: VideoReader, seed: Step, *, start: float = 0.0, stop: float | None = None) -> list[Step]:
        """As ``Tracker.track``. The seed's box becomes that of its mask; alone, as given, where SAM sees no object."""
        check_seed(seed, size_at(reader, seed), start, stop)
        frame = reader.read_frame(seed.frame)
        check_seed(Step(frame.index, frame.time, seed.box, seed.score), frame.size, start, stop)
        session = self._session(seed.box, frame.size)
        first = self._advance(session, frame, 0)
        if first is None:
            return [seed]
        after = self._walk(session, forwards(reader, frame.time, stop), frame.index)
        _start_again(session)
        before = self._walk(session, backwards(reader, frame.time, start), frame.index)
        return join(before, first, after)

    def _session(self, box: Tensor, size: tuple[int, int]) -> Any:
        """A session with the box as the prompt of its frame 0."""
        from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

        state = "cpu" if self.offload else self.model.device
        session = Sam2VideoInferenceSession(
            inference_device=self.model.device, inference_state_device=state, video_storage_device=self.model.device,
            dtype=self.model.dtype,
        )  # fmt: skip
        session.cache.inference_state_device = self.model.device  # what is in it is needed again at once
        corners = box.detach().cpu().double().reshape(2, 2)
        limit = corners.new_tensor([size[1], size[0]])
        corners = torch.minimum(corners.clamp(min=0), limit) * (self.masks.side / limit)
        # transformers takes numbers of pixels and adds half a pixel; ours are centres already
        inputs = {
            "point_coords": (corners - 0.5).float()[None, None],
            "point_labels": torch.tensor([[[2, 3]]], dtype=torch.int32),  # first and last corner of a box
        }
        session.add_point_inputs(session.obj_id_to_idx(1), 0, inputs)
        session.obj_with_new_inputs = [1]
        return session

    def _walk(self, session: Any, chunks: Iterable[list[VideoFrame]], seed: int) -> list[Step]:
        """The object on consecutive frames, walking away from the seed, up to the first frame without it."""
        steps: list[Step] = []
        for frame in islice(chain.from_iterable(chunks), self.window):
            # distance in frames of the video, so that the network knows of frames that could not be read
            step = self._advance(session, frame, abs(frame.index - seed))
            if step is None:
                break
            steps.append(step)
        return steps

    def _advance(self, session: Any, frame: VideoFrame, distance: int) -> Step | None:
        """The object on one more frame, or None where its mask is empty."""
        output = self.model(session, frame=prepare(frame.image, self.model), frame_idx=distance)
        _forget(session, distance - self._reach())
        mask = full_size(output.pred_masks[0], frame.size)
        if not bool(mask.any()):
            return None
        return Step(frame.index, frame.time, mask_boxes(mask)[0], float(output.object_score_logits.sigmoid()))

    def _reach(self) -> int:
        """How many frames back the network looks."""
        return max(int(self.model.config.num_maskmem), int(self.model.config.max_object_pointers_in_encoder))


def _forget(session: Any, before: int) -> None:
    """Drop the frame just seen, masks at the model's size, and all that is remembered of frames up to ``before``."""
    session.processed_frames.clear()
    session.cache.clear_all()
    for outputs in session.output_dict_per_obj[0].values():
        for output in outputs.values():
            output.pop("high_res_masks", None)
            output.pop("pred_masks", None)
            for name in ("maskmem_features", "maskmem_pos_enc"):
                output[name] = output[name].to(session.inference_state_device)
    recent = session.output_dict_per_obj[0]["non_cond_frame_outputs"]
    for old in [distance for distance in recent if distance <= before]:
        del recent[old]
        session.frames_tracked_per_obj[0].pop(old, None)


def _start_again(session: Any) -> None:
    """Remember the seed only, to walk the other way: the published tracker reverses the frames for that."""
    session.output_dict_per_obj[0]["non_cond_frame_outputs"].clear()
    session.frames_tracked_per_obj[0].clear()
