"""``opsin train codec``: from a configuration to the folder of a codec."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opsin.codec import Codec, CodecConfig
from opsin.codec.config import activation_name, named_config
from opsin.codec.patches import grid_of, patchify
from opsin.errors import InvalidConfig, InvalidDataset
from opsin.runtime import resolve_dtype
from opsin.training.codec_config import CodecTrainingConfig
from opsin.training.codec_data import (
    Crops,
    PhotoBatches,
    Photographs,
    StreamBatches,
    first_of_stream,
    hold_out,
    open_photographs,
    open_stream,
)
from opsin.training.codec_loop import CodecLoop
from opsin.training.loop import open_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator

Places = list[tuple[int, int]]
MAE = {"base": "mae-b", "large": "mae-l", "large_gan": "mae_visualize_vit_large_ganloss", "huge": "mae-h"}


def train_codec(config: CodecTrainingConfig) -> dict[str, Any]:
    """Train a codec and write it to ``config.out``, which ``opsin.load("dir:out")`` takes.

    Options and data are checked before a weight is read. Started by ``torchrun`` or ``accelerate launch`` it runs on
    many processes, which hold the same weights throughout. A run that was killed goes on from its last saved state when
    it is started again with the same options. Returns the summary: steps, loss, best PSNR, skipped photographs, folder.

    Raises ``InvalidConfig``, ``InvalidDataset``, ``MissingFile``, ``MissingExtra``, ``UnsupportedSize``, and what
    loading a codec raises.
    """
    accelerator = open_accelerator(config.device)
    config.peak_rate(accelerator.num_processes)
    shape = None if config.init not in ("", "mae") else architecture(config)
    out = Path(config.out)
    (out / "training").mkdir(parents=True, exist_ok=True)
    process = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    with accelerator.main_process_first():
        train, val = open_data(config, **process)
    with torch.random.fork_rng():
        with accelerator.main_process_first():  # weights are downloaded once
            codec = start(config, shape)
        grid_of(config.canvas, codec.encoder.patch)
        torch.manual_seed(config.seed)  # published: queries are drawn anew
        codec.resize(config.canvas, compat="published" if config.compat == "published" else None)
        codec.card = replace(codec.card, **facts(config))
        if config.start == "patches" and not (out / "training/state.pt").exists():
            start_as_patches(codec, some_images(train, accelerator))
        dtype = resolve_dtype(config.dtype, accelerator.device, allow_bfloat16=codec.card.bfloat16)
        summary = CodecLoop(config, accelerator, codec, train, val, out, dtype).run()
    return {**summary, "out": str(out)}


def architecture(config: CodecTrainingConfig) -> CodecConfig:
    """The networks of a run that starts from nothing or from MAE. ``UnsupportedSize``, ``InvalidConfig``."""
    changes = {"size": config.canvas, "activation": config.activation}
    if config.size != "custom":
        return named_config(config.size, **changes)
    c = config
    numbers = (c.dim, c.layers, c.heads, c.decoder_dim, c.decoder_layers, c.decoder_heads, c.patch_size)
    return CodecConfig(*numbers, **changes)  # type: ignore[arg-type]


def start(config: CodecTrainingConfig, shape: CodecConfig | None) -> Codec:
    """The codec at step 0. From another codec, its activation is kept unless one is named."""
    if shape is not None and config.init == "":
        return Codec.create(shape, seed=config.seed)
    if shape is None:
        codec = Codec.from_pretrained(config.init, device="cpu", activation=config.activation)
        if config.activation is not None and activation_name(config.activation) != codec.encoder.activation:
            own = codec.encoder.activation or "none"
            raise InvalidConfig(f"The code of {config.init} has the activation {own}", got=config.activation)
        return codec
    codec = Codec.from_mae(MAE[config.size], activation=config.activation, seed=config.seed)
    if config.compat == "published":  # there MAE's class token gets lost
        fresh = Codec.create(replace(shape, depth=1, decoder_depth=1), seed=config.seed)
        codec.encoder.cls_token.data.copy_(fresh.encoder.cls_token.data)
    return codec


def some_images(train: PhotoBatches | StreamBatches, accelerator: Accelerator, count: int = 512) -> Tensor:
    """The first ``count`` images to train on (or a few more), the same ones in every process."""
    batches = (train[i] for i in range(count)) if isinstance(train, PhotoBatches) else iter(train)
    needed = math.ceil(count / (train.batch_size * train.world))
    images = torch.cat([batch.images for _, batch in zip(range(needed), batches, strict=False)])
    return accelerator.gather(images.to(accelerator.device)).cpu()


@torch.no_grad()
def start_as_patches(codec: Codec, images: Tensor) -> None:
    """Let the code begin as the main components of each patch of ``images (B, 3, H, W)`` in [0, 1], and be decoded.

    A network with random weights spends thousands of steps until one vector tells places apart. Here each head of the
    encoder's last layer looks at one patch and takes ``D / heads - 1`` principal components of it into the class token;
    the decoder's queries each open those hidden units of the next MLP that hold the components of their own patch, and
    the last layer turns them into pixels. All other branches add nothing at first, and are free to learn. What is left
    of each head's dimensions carries a constant, so that the norms on the way leave the components nearly as they are.

    ``InvalidConfig`` unless there are as many heads as patches, an activation of none, and room for the components.
    """
    encoder: Any = codec.encoder
    decoder: Any = codec.decoder
    heads, places = encoder.mae_encoder.blocks[-1].attn.heads, encoder.grid[0] * encoder.grid[1]
    kept = encoder.dim // heads - 1
    if heads != places or not 1 <= kept <= heads or kept >= decoder.mae_decoder.decoder_norm.weight.numel():
        raise InvalidConfig(
            "start=patches wants as many heads as patches, and for each 2 to heads + 1 of the code's dimensions",
            got=f"{heads} heads, {places} patches, {encoder.dim} dimensions",
        )
    if encoder.activation:
        raise InvalidConfig("start=patches wants no activation", got=encoder.activation)
    rows = patchify(codec.normalise(images), encoder.patch).flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    spread = values[-kept:].flip(0).clamp(min=float(values[-1]) / 2500).sqrt()
    components = vectors[:, -kept:].flip(1), spread, rows.mean(0)
    blocks: Any = (*encoder.mae_encoder.blocks, *decoder.mae_decoder.decoder_blocks)
    for block in blocks:
        block.attn.proj.weight.zero_()
        block.mlp.fc2.weight.zero_()
    signal = 0.3  # of components in the class token, where the constant is 4
    constant = torch.arange(heads) * (kept + 1) + kept  # of each head the dimension that carries no component
    _gather_components(encoder, components, constant, signal)
    width = math.sqrt((4.0**2 + signal**2 * kept) * heads / encoder.dim)  # what the encoder's last norm divides by
    _place_components(decoder, components, constant, width / signal)


Components = tuple[Tensor, Tensor, Tensor]  # basis (3·p², K), deviations (K,) and mean (3·p²,)


def _gather_components(encoder: Any, components: Components, constant: Tensor, signal: float) -> None:
    """Patch embedding and last layer such that the class token holds the components of all patches."""
    (basis, spread, mean), dim, places = components, encoder.dim, len(constant)
    kept, step = len(spread), dim // places
    share, sharp = 0.6, 10.0  # of components in their token; of the attention
    free = torch.ones(dim, dtype=torch.bool).index_fill(0, constant, False)
    taken = constant[:kept]  # where a patch's components lie in its own token
    conv = encoder.mae_encoder.patch_embed.proj
    weight = conv.weight.double().flatten(1) * 0.05
    weight[taken] = _channels_first((basis * (share / spread)).T, encoder.patch)
    conv.weight.copy_(weight.view_as(conv.weight))
    conv.bias.copy_(-weight @ _channels_first(mean[None], encoder.patch)[0])
    first = torch.zeros(dim, dtype=torch.float64)
    first[constant] = 4.0 * torch.tensor([1.0, -1.0]).repeat(places)[:places].double()
    encoder.cls_token.copy_(first)
    normed, scale = _normed(torch.cat([first[None], encoder.pos_embed[0, 1:].double()]), share**2 * kept / dim)
    # Positions are a sum of a row and a column: a head wants both of its patch, which only that patch has.
    row, column = torch.arange(places) // encoder.grid[1], torch.arange(places) % encoder.grid[1]
    wanted = (row[:, None] == row).double() + (column[:, None] == column).double()
    keys = torch.linalg.pinv(normed[:, free]) @ torch.cat([torch.zeros(1, places).double(), wanted])
    attention = encoder.mae_encoder.blocks[-1].attn
    weight, offset = attention.qkv.weight.zero_(), attention.qkv.bias.zero_()
    offset[torch.arange(places) * step] = sharp * math.sqrt(step)
    for head in range(places):
        weight[dim + head * step, free] = keys[:, head].to(weight)
        values = 2 * dim + head * step + torch.arange(kept)
        factor = float(scale[1 + head]) / share
        weight[values, taken] = factor
        offset[values] = (-normed[1 + head, taken] * factor).to(offset)
    attention.proj.weight.copy_(torch.diag(free * signal))


def _place_components(decoder: Any, components: Components, constant: Tensor, factor: float) -> None:
    """Queries, the step from the code to patches, and the way to pixels, such that each patch gets its components.

    ``factor`` makes components of deviation 1 from those in the code.
    """
    (basis, spread, mean), dim, places = components, decoder.dim, len(constant)
    kept, step, taken = len(spread), dim // places, constant[: len(spread)]
    strength, small, gate, loud = 8.0, 0.3, 12.0, 0.3  # of queries; of the code beside them; of opening; at the end
    turns = torch.arange(places).double()
    signs = math.sqrt(2) * torch.cos(math.pi * (turns + 0.5) * turns[:, None] / places)  # a row per patch, orthogonal
    signs[0] = 1
    queries = torch.zeros(places, dim, dtype=torch.float64)
    queries[:, constant] = strength * signs
    decoder.learned_embed.copy_(queries - decoder.pos_embed[0])
    part = decoder.patch_recon
    part.attn.in_proj_weight[2 * dim :] = torch.eye(dim).index_fill(0, constant, 0) * (small * factor)
    part.attn.in_proj_bias.zero_()
    part.attn.out_proj.weight.copy_(torch.eye(dim))
    normed, scale = _normed(queries, small**2 * kept * places / dim)
    solve = torch.linalg.pinv(normed[:, constant])
    units, back = part.mlp[0], part.mlp[3]
    back.weight.zero_()
    for place in range(places):
        of = place * step + torch.arange(step)
        weight = torch.zeros(step, dim, dtype=torch.float64)
        weight[range(kept), of[:kept]] = scale[place] / small
        opened = gate * torch.eye(places).double()[place] - weight @ normed.T
        weight[:, constant] = opened @ solve.T
        units.weight[of] = weight.to(units.weight)
        units.bias[of] = -gate / 2
        back.weight[taken, of[:kept]] = 1
        back.weight[constant, of[kept]] = (-2 * strength / gate * signs[place]).to(back.weight)
    back.bias[taken] = -gate / 2
    embed, pixels = decoder.mae_decoder.decoder_embed, decoder.mae_decoder.decoder_pred
    inner = embed.out_features
    embed.weight[:, constant] = 0
    embed.weight[:kept] = 0
    embed.weight[range(kept), taken] = loud
    embed.bias[kept:] = torch.tensor([1.0, -1.0]).repeat(inner)[: inner - kept]
    spill = float(embed.weight[kept:].square().sum()) * small**2
    width = math.sqrt((inner - kept + loud**2 * kept + spill) / inner)
    pixels.weight.zero_()[:, :kept] = (basis * spread * (width / loud)).to(pixels.weight)
    pixels.bias.copy_(mean)


def _channels_first(rows: Tensor, patch: int) -> Tensor:
    """Rows ``(R, p·p·3)`` in the order of patches as rows in the order of a convolution."""
    return rows.unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2).flatten(1)


def _normed(tokens: Tensor, variance: float) -> tuple[Tensor, Tensor]:
    """Tokens ``(N, D)`` after a LayerNorm when something of that ``variance`` is added, and what it divides by."""
    scale = (tokens.var(1, unbiased=False) + variance).sqrt()
    return (tokens - tokens.mean(1, keepdim=True)) / scale[:, None], scale


def facts(config: CodecTrainingConfig) -> dict[str, Any]:
    """What the card of the trained codec says of itself, in place of what its start said."""
    return {
        "name": config.name or Path(config.out).name,
        "source": "",  # where the folder lies is no property of the model
        "revision": "main",
        "files": (),
        "sha256": "",
        "trained_on": ", ".join(Path(spec.partition("@")[0]).name for spec in config.train),
        "measured": {},
    }


def open_data(
    config: CodecTrainingConfig, *, rank: int = 0, world: int = 1
) -> tuple[PhotoBatches | StreamBatches, PhotoBatches | None]:
    """Training batches, and the photographs to validate on where there are any. Raises what the sources raise."""
    crops = Crops(config.canvas, config.crop, config.flip, config.compat == "published")
    process: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed, "rank": rank, "world": world}
    val: list[Photographs] = []
    train: PhotoBatches | StreamBatches
    if config.streaming:
        if len(config.train) > 1:
            raise InvalidDataset("One data set is streamed", got=", ".join(config.train))
        train = open_stream(config.train[0], crops, **process)
        val, held = [first_of_stream(spec, config.validation_images) for spec in config.val], None
    else:
        sources = [open_photographs(spec) for spec in config.train]
        chosen, held = hold_out(sources, 0.0 if config.val else config.holdout)
        train = PhotoBatches(sources, crops, cache_mb=config.cache_mb, chosen=chosen, **process)
        val = [open_photographs(spec) for spec in config.val] if config.val else sources
    places: Places = held if held and not config.val else [(s, i) for s, p in enumerate(val) for i in range(len(p))]
    if not config.validation_images or not (config.val or held):
        return train, None
    count = min(len(places), config.validation_images)
    places = [places[i * len(places) // count] for i in range(count)]  # evenly from all sources
    return train, PhotoBatches(val, crops, cache_mb=config.cache_mb, chosen=places, **process)
