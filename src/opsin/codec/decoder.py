"""From a code, or from all tokens, to the pixels of an image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.codec.config import CodecConfig, as_size
from opsin.codec.layers import EPS, Block, Norm, assign, count_blocks, initialise, lean, product, shape_of, square, wide
from opsin.codec.patches import grid_of, resample_rows, sincos_positions
from opsin.errors import IncompatibleModel, UnsupportedSize
from opsin.geometry import Size


class _OneKeyAttention(nn.Module):
    """Cross-attention over a single key: its softmax is 1, so every query gets the projected value."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, key: Tensor) -> Tensor:
        """``(B, D)`` → ``(B, D)``; the first two thirds of the weights, for queries and keys, change nothing."""
        start = 2 * key.shape[-1]
        return self.out_proj(F.linear(key, self.in_proj_weight[start:], self.in_proj_bias[start:]))


class _PatchReconstruction(nn.Module):
    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.attn = _OneKeyAttention(dim)
        self.q_norm, self.kv_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))
        self.x_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, codes: Tensor) -> Tensor:
        """Queries ``(1, N, D)`` and codes ``(B, D)`` → ``(B, N, D)``."""
        found = self.attn(self.kv_norm(codes))[:, None]
        if torch.is_grad_enabled():
            # The published optimiser shrinks q_norm too: its gradient is zero, not absent.
            found = found + 0 * (self.q_norm.weight.sum() + self.q_norm.bias.sum())
        if self.dropout.training and self.dropout.p:
            found = self.dropout(found.expand(-1, queries.shape[1], -1))
        tokens = queries + found
        wide, gelu, dropout, narrow = cast(Iterable[Any], self.mlp)
        if not torch.is_grad_enabled():
            several = len(codes) > 1 and not torch.is_autocast_enabled(codes.device.type)
            opened = self._opened(queries, found, wide) if several else product(wide, self.x_norm(tokens), gelu=True)
            return tokens + self.dropout(product(narrow, dropout(opened)))
        hidden = lean(lambda given: wide(self.x_norm(given)), tokens)
        return tokens + self.dropout(lean(lambda given: narrow(dropout(gelu(given))), hidden, random=self.training))

    def _opened(self, queries: Tensor, found: Tensor, linear: nn.Linear) -> Tensor:
        """GELU of ``linear`` of ``queries (1, N, D) + found (B, 1, D)``, normed: ``(B, N, 4·D)``.

        Before the norm's division both sides are linear, so each goes through the matrix on its own: ``N + B`` rows
        instead of ``N · B``. No gradient.
        """
        norm = self.x_norm

        def through(rows: Tensor) -> Tensor:
            return F.linear((rows - rows.mean(-1, keepdim=True)) * norm.weight, linear.weight)

        places, images = through(queries[0]), through(found)
        scale = torch.rsqrt((queries + found).var(-1, correction=0, keepdim=True) + norm.eps)
        constant = linear(norm.bias)
        opened = places.new_empty((len(found), *places.shape))
        for image, factor, out in zip(images, scale, opened, strict=True):
            torch.ops.aten.gelu.out(torch.addcmul(constant, places + image, factor), out=out)
        return opened


class _Transformer(nn.Module):
    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        width = config.decoder_dim
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))  # of MAE's masked training; unused here
        count = 1 + config.grid[0] * config.grid[1]
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, count, width), requires_grad=False)
        self.decoder_embed = nn.Linear(config.dim, width)
        self.decoder_blocks = nn.ModuleList(Block(width, config.decoder_heads) for _ in range(config.decoder_depth))
        self.decoder_norm = Norm(width, eps=EPS)
        self.decoder_pred = nn.Linear(width, 3 * config.patch**2)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(wide(tokens.dtype))
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens))


class CodecDecoder(nn.Module):
    """The decoder of btnk_mae (REMI, arXiv 2507.02064): learned queries, moved by the code, through the MAE decoder.

    ``forward(codes (B, D))`` and :meth:`full` ``(tokens (B, 1 + N, D))`` give normalised patches ``(B, N, 3·p²)``.
    State-dict keys are the published ones, also of what one key makes superfluous: queries, keys, their norm.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.dim, self.patch, self.grid = config.dim, config.patch, config.grid
        count = self.grid[0] * self.grid[1]
        self.learned_embed = nn.Parameter(torch.empty(1, count, config.dim))
        self.pos_embed = nn.Parameter(torch.empty(1, count, config.dim), requires_grad=False)
        self.patch_recon = _PatchReconstruction(config.dim, config.dropout)
        self.mae_decoder = _Transformer(config)
        self.eval()  # dropout is for training alone
        if not self.learned_embed.is_meta:
            self.initialise()

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, as the published training starts without MAE, and compute the positions."""
        part, attention = self.mae_decoder, self.patch_recon.attn
        self.pos_embed.copy_(sincos_positions(self.dim, self.grid, class_row=False))
        inner = sincos_positions(part.mask_token.shape[-1], self.grid, class_row=True)
        part.decoder_pos_embed.copy_(inner)
        nn.init.trunc_normal_(self.learned_embed, std=0.02, generator=generator)
        initialise(self, generator)
        nn.init.xavier_uniform_(attention.in_proj_weight, generator=generator)
        nn.init.zeros_(attention.in_proj_bias)
        nn.init.normal_(part.mask_token, std=0.02, generator=generator)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], *, heads: int, size: int | Size | None = None, dropout: float = 0.1
    ) -> CodecDecoder:
        """Weights under the published keys, in their dtype; widths, depth and patch are read off the shapes.

        ``heads`` of its transformer; ``size`` of the images, by default a square. A file without the fixed positions
        gets them. ``InvalidCheckpoint`` for other keys or shapes.
        """
        learned, width = shape_of(state, "learned_embed"), shape_of(state, "mae_decoder.decoder_embed.bias")[0]
        patch = square(shape_of(state, "mae_decoder.decoder_pred.bias")[0] // 3)
        depth = count_blocks(state, "mae_decoder.decoder_blocks")
        wanted = as_size(square(learned[1]) * patch if size is None else size)
        config = CodecConfig(learned[2], 1, 1, width, depth, heads, patch, wanted, dropout=dropout)
        state, dtype = {**state}, state["learned_embed"].dtype
        for key, dim, row in (("pos_embed", learned[2], False), ("mae_decoder.decoder_pos_embed", width, True)):
            state.setdefault(key, sincos_positions(dim, config.grid, class_row=row).to(dtype))
        with torch.device("meta"):
            decoder = cls(config)
        return assign(decoder, state, "the decoder of a codec")

    @property
    def size(self) -> Size:
        """``(H, W)`` of the images it gives."""
        return self.grid[0] * self.patch, self.grid[1] * self.patch

    def forward(self, codes: Tensor) -> Tensor:
        """Codes ``(B, D)`` → normalised patches ``(B, N, 3·p²)``. ``IncompatibleModel`` for another width."""
        if codes.ndim != 2 or codes.shape[1] != self.dim:
            raise IncompatibleModel(f"This decoder takes codes (B, {self.dim})", got=tuple(codes.shape))
        patches = self.patch_recon(self.learned_embed + self.pos_embed, codes)
        return self.mae_decoder(self.mae_decoder.decoder_embed(patches))

    def full(self, tokens: Tensor) -> Tensor:
        """All tokens of the encoder ``(B, 1 + N, D)`` → normalised patches ``(B, N, 3·p²)``, as MAE without masks."""
        count = self.grid[0] * self.grid[1]
        if tokens.ndim != 3 or tokens.shape[2] != self.dim:
            raise IncompatibleModel(f"This decoder takes tokens (B, {1 + count}, {self.dim})", got=tuple(tokens.shape))
        if tokens.shape[1] != 1 + count:
            raise UnsupportedSize(f"{1 + count} tokens of a {self.grid[0]}×{self.grid[1]} grid", got=tokens.shape[1])
        part = self.mae_decoder
        return part(part.decoder_embed(tokens) + part.decoder_pos_embed)[:, 1:]

    def resize(self, size: int | Size, *, compat: Literal["published"] | None = None) -> None:
        """Give images of another ``size``: queries and positions are resampled (bicubic), in the same ``Parameter``.

        ``compat="published"`` forgets the queries instead (a standard normal draw, 50 times the scale of a fresh model)
        and computes the tables anew.
        """
        grid = grid_of(as_size(size), self.patch)
        if grid == self.grid:
            return
        part, learned = self.mae_decoder, self.learned_embed
        if compat == "published":
            learned.data = torch.randn(1, grid[0] * grid[1], self.dim).to(learned)
            self.pos_embed.data = sincos_positions(self.dim, grid, class_row=False).to(self.pos_embed)
            table = part.decoder_pos_embed
            table.data = sincos_positions(table.shape[-1], grid, class_row=True).to(table)
        else:
            for table in (learned, self.pos_embed, part.decoder_pos_embed):
                table.data = resample_rows(table.data, self.grid, grid)
        self.grid = grid
