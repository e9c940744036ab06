"""The neck, prompt encoder and mask decoder of SAM, for images that another backbone has already seen.

Kirillov et al., "Segment Anything" (2023). The modules are those of ``transformers``; the trunk, 99 % of a SAM, is
neither read nor built. RADSeg+ feeds the neck with what RADIO's ``sam`` head says the trunk would have seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from opsin import hub
from opsin.errors import IncompatibleModel, InvalidCheckpoint, InvalidPrompt, check_compat
from opsin.remote_tensors import load_tensors, read_tensors
from opsin.runtime import in_batches, resolve_device, resolve_dtype, to_model

FRAME = 1024  # side of the square, in pixels, that SAM lays every image into, at its top left corner
Compat = Literal["published"] | None
PATCH = 16
GRID = FRAME // PATCH
LOW_RESOLUTION = 256  # side of mask prompts and of predicted masks
HEADS = 8  # of every published SAM; the only fact that shapes do not tell
DEFAULT = "hf:facebook/sam-vit-huge"

_PARTS = (
    "image_encoder.neck.", "vision_encoder.neck.", "neck.",
    "shared_image_embedding.", "prompt_encoder.", "mask_decoder.",
)  # fmt: skip
# Published names, and those of a transformers file, to the names in SamDecoder.
_RENAMED = (
    (r"^(image_encoder|vision_encoder)\.neck\.", "neck."),
    (r"^neck\.0\.", "neck.conv1."),
    (r"^neck\.1\.", "neck.layer_norm1."),
    (r"^neck\.2\.", "neck.conv2."),
    (r"^neck\.3\.", "neck.layer_norm2."),
    (r"^shared_image_embedding\.", "prompt_encoder.shared_embedding."),  # files hold this matrix once or twice
    (r"\.pe_layer\.positional_encoding_gaussian_matrix$", ".shared_embedding.positional_embedding"),
    (r"\.point_embeddings\.", ".point_embed."),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
    (r"\.norm(\d|_final_attn)\.", r".layer_norm\1."),
)
_FEED_FORWARD = re.compile(r"^(.*(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.layers\.(\d+)\.")


class SamDecoder(nn.Module):
    """What is left of a SAM without its trunk. Build it with :func:`load` or :meth:`from_state_dict`.

    Positions are continuous coordinates of the 1024 frame: pixel centres at +0.5, boxes half-open.
    """

    neck: Any  # the three are modules of transformers
    prompt_encoder: Any
    mask_decoder: Any

    def __init__(
        self, *, features: int, dim: int, mask_channels: int, mlp: int, layers: int, downsample: int,
        masks: int, iou_depth: int, iou_dim: int,
    ) -> None:  # fmt: skip
        from transformers import SamConfig
        from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder, SamVisionNeck

        super().__init__()
        config: Any = SamConfig(
            vision_config={
                "hidden_size": features, "output_channels": dim, "num_pos_feats": dim // 2,
                "image_size": FRAME, "patch_size": PATCH,
            },
            prompt_encoder_config={
                "hidden_size": dim, "image_size": FRAME, "patch_size": PATCH, "mask_input_channels": mask_channels,
            },
            # The published network has torch's own epsilon in its transformer; transformers' default is another.
            mask_decoder_config={
                "hidden_size": dim, "mlp_dim": mlp, "num_hidden_layers": layers, "num_attention_heads": HEADS,
                "attention_downsample_rate": downsample, "num_multimask_outputs": masks - 1,
                "iou_head_depth": iou_depth, "iou_head_hidden_dim": iou_dim, "layer_norm_eps": 1e-5,
            },
        )  # fmt: skip
        config.mask_decoder_config._attn_implementation = "sdpa"
        self.neck = SamVisionNeck(config.vision_config)
        self.prompt_encoder = SamPromptEncoder(config)
        self.mask_decoder = SamMaskDecoder(config.mask_decoder_config)
        self.features, self.dim = features, dim

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> SamDecoder:
        """From tensors under the published names (``sam_vit_h_4b8939.pth``), those of ``transformers``, or its own.

        All sizes are read off the shapes, the dtype off the neck; tensors of the trunk are passed over.
        Raises ``InvalidCheckpoint`` when the rest does not fit.
        """
        state = _renamed(state)
        try:
            decoder = cls._empty(state)
        except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            got = f"missing: {error.args[0]}" if isinstance(error, KeyError) else str(error)
            raise InvalidCheckpoint("The weights must be those of a SAM", got=got) from error
        expected = {key: tuple(value.shape) for key, value in decoder.state_dict().items()}
        hub.check_keys(state, expected, "SAM's neck, prompt encoder and mask decoder")
        decoder.load_state_dict(state, assign=True)
        dtype = state["neck.conv1.weight"].dtype
        return decoder.to(dtype).eval().requires_grad_(False)

    @classmethod
    def _empty(cls, state: Mapping[str, Tensor]) -> SamDecoder:
        neck = state["neck.conv1.weight"]
        layers = {key.split(".")[3] for key in state if key.startswith("mask_decoder.transformer.layers.")}
        hidden = {key.split(".")[3] for key in state if key.startswith("mask_decoder.iou_prediction_head.layers.")}
        cross = state["mask_decoder.transformer.layers.0.cross_attn_token_to_image.q_proj.weight"]
        with torch.device("meta"):
            return cls(
                features=neck.shape[1],
                dim=neck.shape[0],
                mask_channels=state["prompt_encoder.mask_embed.conv2.weight"].shape[0],
                mlp=state["mask_decoder.transformer.layers.0.mlp.lin1.weight"].shape[0],
                layers=len(layers),
                downsample=neck.shape[0] // cross.shape[0],
                masks=state["mask_decoder.mask_tokens.weight"].shape[0],
                iou_depth=2 + len(hidden),
                iou_dim=state["mask_decoder.iou_prediction_head.proj_in.weight"].shape[0],
            )

    def embed(self, features: Tensor) -> Tensor:
        """Features ``(B, features, h, w)``, a grid of at most 64×64 patches, → image embedding ``(B, dim, 64, 64)``.

        A smaller grid is laid at the top left; the rest is zero, as in the published RADSeg+.
        """
        height, width = features.shape[-2:]
        if features.ndim != 4 or features.shape[1] != self.features or height > GRID or width > GRID:
            raise IncompatibleModel(
                f"SAM's neck takes features (B, {self.features}, h, w) with h, w ≤ {GRID}", got=tuple(features.shape)
            )
        padded = nn.functional.pad(to_model(features, self), (0, GRID - width, 0, GRID - height))
        return self.neck(padded.permute(0, 2, 3, 1))

    def decode(
        self,
        embedding: Tensor,
        points: Tensor,
        boxes: Tensor,
        masks: Tensor | None = None,
        *,
        mask_index: Tensor | None = None,
        batch_size: int = 4,
        compat: Compat = None,
    ) -> tuple[Tensor, Tensor]:
        """One mask for each of ``K`` objects, each prompted with a point inside, a box and, if given, a rough mask.

        Args:
            embedding: ``(1, dim, 64, 64)`` from :meth:`embed`.
            points: ``(K, 2)`` x, y and boxes ``(K, 4)`` x1, y1, x2, y2, continuous coordinates of the 1024 frame.
            masks: ``(M, 1, 256, 256)`` logits, quarter resolution of the frame.
            mask_index: ``(K,)`` the row of ``masks`` of each object; by default one row for each (``M = K``).
            batch_size: objects at a time, each some 70 MB in a SAM of 256 channels; halved when memory runs out.
            compat: ``"published"`` normalises mask prompts over rows instead of channels, as the published RADSeg+
                does: it hands them over without a batch axis, which the layer then takes the channels for.

        Returns:
            Mask logits ``(K, 256, 256)`` over the whole frame, and the predicted IoU ``(K,)`` of each.

        Raises:
            InvalidPrompt: shapes that do not belong together.
        """
        check_compat(compat)
        count = len(points)
        if points.shape != (count, 2) or boxes.shape != (count, 4):
            got = f"points {tuple(points.shape)}, boxes {tuple(boxes.shape)}"
            raise InvalidPrompt("Prompts are points (K, 2) and boxes (K, 4)", got=got)
        side = LOW_RESOLUTION
        if masks is not None and (masks.shape[1:] != (1, side, side) or (mask_index is None and len(masks) != count)):
            raise InvalidPrompt(f"Mask prompts are (K, 1, {side}, {side})", got=tuple(masks.shape))
        embedding = to_model(embedding, self)
        places = self._image_positions()
        rows = torch.arange(count) if mask_index is None else mask_index.cpu()
        # transformers takes numbers of pixels and adds half a pixel; ours are centres already
        points, boxes = (t.cpu().double() - 0.5 for t in (points, boxes))

        def run(chosen: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
            index = torch.as_tensor(chosen)
            ones = torch.ones(len(index), 1, 1, dtype=torch.int64, device=places.device)
            sparse, dense = self.prompt_encoder(
                points[index][:, None, None].to(places), ones, boxes[index][:, None].to(places), None
            )
            if masks is not None:
                embed = self.prompt_encoder.mask_embed if compat is None else self._published_mask_embedding
                dense = embed(to_model(masks[rows[index].to(masks.device)], self))
            logits, iou = self.mask_decoder(
                image_embeddings=embedding.expand(len(index), -1, -1, -1),
                image_positional_embeddings=places.to(embedding.dtype).expand(len(index), -1, -1, -1),
                sparse_prompt_embeddings=sparse.to(embedding.dtype),
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
            # a copy, for the decoder made four masks and all would stay in memory
            return list(zip(logits[:, 0, 0].clone(), iou[:, 0, 0], strict=True))

        found = in_batches(run, range(count), batch_size)
        if not found:
            return embedding.new_zeros(0, side, side), embedding.new_zeros(0)
        return torch.stack([logits for logits, _ in found]), torch.stack([iou for _, iou in found])

    def _image_positions(self) -> Tensor:
        """The encoded centres of the image's patches ``(1, dim, 64, 64)``."""
        positions = self.prompt_encoder.shared_embedding
        matrix = positions.positional_embedding
        centres = (torch.arange(GRID, device=matrix.device, dtype=matrix.dtype) + 0.5) / GRID
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        return positions(torch.stack([x, y], -1)).permute(2, 0, 1)[None]

    def _published_mask_embedding(self, masks: Tensor) -> Tensor:
        """As ``mask_embed``, normalised over the rows of each column and channel, with the gains of the channels."""
        layers = self.prompt_encoder.mask_embed

        def norm(layer: nn.LayerNorm, hidden: Tensor) -> Tensor:
            by_row = nn.functional.layer_norm(hidden.transpose(2, 3), hidden.shape[2:3], eps=layer.eps).transpose(2, 3)
            return by_row * layer.weight[:, None, None] + layer.bias[:, None, None]

        hidden = layers.activation(norm(layers.layer_norm1, layers.conv1(masks)))
        hidden = layers.activation(norm(layers.layer_norm2, layers.conv2(hidden)))
        return layers.conv3(hidden)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SamDecoder:
        """Keep the frequencies of positions in float32 at least: half precision would move prompts by pixels."""
        owner = self.prompt_encoder.shared_embedding
        exact = owner.positional_embedding.data
        super()._apply(fn, recurse)
        moved = owner.positional_embedding
        if moved.dtype.itemsize < 4:
            wide = exact.dtype if exact.dtype.itemsize >= 4 else torch.float32
            moved.data = exact.to(device=moved.device, dtype=wide)
        return self


def load(
    ref: str | Path = DEFAULT,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> SamDecoder:
    """The frozen decoder half of a published SAM; nothing of its trunk is downloaded.

    Args:
        ref: ``"hf:facebook/sam-vit-huge"`` (the one that RADIO's ``sam`` head fits), another ``hf:`` or ``dir:``
            reference, a folder, or the path of a published ``sam_vit_*.pth``.
        device: by default the machine's accelerator, else the CPU.
        dtype: by default float32.

    Raises:
        ModelUnavailable, MissingFile, InvalidCheckpoint (not a SAM, or damaged).
    """
    path = Path(str(ref).removeprefix("dir:")).expanduser()

    single_file = not str(ref).startswith("hf:") and path.suffix in (".pth", ".pt", ".safetensors")
    state = read_tensors(path, is_wanted) if single_file else load_tensors(ref, is_wanted, part="sam-decoder")
    target = resolve_device(device)
    return SamDecoder.from_state_dict(state).to(target, resolve_dtype(dtype, target))


def is_wanted(name: str) -> bool:
    """Whether :class:`SamDecoder` needs the tensor of this name of a SAM; it needs none of the trunk."""
    return name.startswith(_PARTS)


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The wanted tensors under the names of :class:`SamDecoder`."""
    published = any(name.startswith("image_encoder.") for name in state)
    depth: dict[str, int] = {}  # number of the last layer of each feed-forward network
    for found in filter(None, map(_FEED_FORWARD.match, state)):
        depth[found[1]] = max(depth.get(found[1], 0), int(found[2]))

    def feed_forward(found: re.Match[str]) -> str:
        head, number = found[1], int(found[2])
        if number == 0:
            return f"{head}.proj_in."
        return f"{head}.proj_out." if number == depth[head] else f"{head}.layers.{number - 1}."

    renamed = {}
    for name, value in state.items():
        if is_wanted(name):
            name = _FEED_FORWARD.sub(feed_forward, name) if published else name
            for pattern, replacement in _RENAMED:
                name = re.sub(pattern, replacement, name)
            renamed[name] = value
    return renamed
