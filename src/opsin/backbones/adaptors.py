"""Adaptors of RADIO: small heads that lead from its tokens into the feature space of one of its teachers.

Keys and shapes are those of the published checkpoints; every width, depth and kind is read off the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.errors import IncompatibleModel, InvalidCheckpoint
from opsin.geometry import Size
from opsin.hub import check_keys

ATTENTION_HEADS = 16  # of the "attn" kind: the one number that no shape tells
VERSIONS = ("v1", "v2", "attn")


class Mlp1(nn.Module):
    """Kind ``v1``: linear, LayerNorm, ReLU, any number of the same, linear."""

    def __init__(self, inputs: int, hidden: int, outputs: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.norm = nn.LayerNorm(hidden)
        layers = [(nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.ReLU()) for _ in range(inner)]
        self.inner = nn.Sequential(*(module for layer in layers for module in layer))
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, tokens: Tensor, grid: Size | None = None) -> Tensor:
        return self.fc2(self.inner(F.relu(self.norm(self.fc1(tokens)))))


class Mlp2(nn.Module):
    """Kind ``v2``: linear, residual blocks of LayerNorm, GELU, linear, and a last such block without residual.

    ``upsample`` u > 1: each token gives u × u of them, laid out on a grid that is u times as fine.
    """

    def __init__(
        self, inputs: int, hidden: int, outputs: int, inner: int, *, pre_norm: bool = False, upsample: int = 1
    ) -> None:
        super().__init__()
        self.upsample = upsample
        self.pre_norm = nn.Sequential(nn.LayerNorm(inputs), nn.GELU()) if pre_norm else nn.Identity()
        self.fc1 = nn.Linear(inputs, hidden)
        self.blocks = nn.ModuleList(_step(hidden, hidden) for _ in range(inner))
        self.final = _step(hidden, outputs)

    def forward(self, tokens: Tensor, grid: Size | None = None) -> Tensor:
        tokens = self.fc1(self.pre_norm(tokens))
        for block in self.blocks:
            tokens = tokens + block(tokens)
        tokens = self.final(tokens)
        if self.upsample == 1 or grid is None:
            return tokens
        cells = tokens.unflatten(-1, (self.upsample, self.upsample, -1)).unflatten(-4, grid)
        return cells.transpose(-4, -3).flatten(-5, -2)  # (h, w, u, u, E) → (h·u·w·u, E)


class AttentionMlp(nn.Module):
    """Kind ``attn``: two transformer blocks over the patches, then a ``v2`` MLP."""

    def __init__(self, blocks: list[Block], mlp: Mlp2) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.mlp = mlp

    def forward(self, tokens: Tensor, grid: Size | None = None) -> Tensor:
        return self.mlp(self.blocks(tokens), grid)


class Scale(nn.Module):
    """One learned gain per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention with one projection for query, key and value."""

    def __init__(self, dim: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(-2, -3).flatten(-2))


class Block(nn.Module):
    """A pre-norm transformer block, with LayerScale where the weights have it."""

    def __init__(self, dim: int, hidden: int, heads: int, *, bias: bool, scale: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, bias)
        self.ls1 = Scale(dim) if scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        self.ls2 = Scale(dim) if scale else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        return tokens + self.ls2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(tokens)))))


class Adaptor(nn.Module):
    """The two heads of one teacher.

    ``token`` is the index of the class token that the summary head was trained on; ``text`` the reference of the
    teacher's text tower, empty for a teacher without words; ``upsample`` how much finer the grid of :meth:`feat_mlp`
    is than that of the patches.
    """

    def __init__(
        self, head: nn.Module | None, features: nn.Module | None, *, token: int = 0, text: str = "", upsample: int = 1
    ) -> None:
        super().__init__()
        self.head = head
        self.features = features
        self.token, self.text, self.upsample = token, text, upsample
        self.eval().requires_grad_(False)

    @classmethod
    def from_state_dict(
        cls,
        head: Mapping[str, Tensor],
        features: Mapping[str, Tensor],
        version: str | None = None,
        *,
        token: int = 0,
        text: str = "",
        upsample: int = 1,
    ) -> Adaptor:
        """From the weights of the summary head and the patch head, under their published key names.

        Args:
            head, features: tensors of one dtype; empty for a head that the checkpoint does not have.
            version: ``"v1"``, ``"v2"``, ``"attn"``: what both heads have to be; None reads it off the keys.

        Raises:
            InvalidCheckpoint: keys or shapes of no known kind.
        """
        parts = [
            _network(head, version, 1, "the summary head") if head else None,
            _network(features, version, upsample, "the patch head") if features else None,
        ]
        return cls(*parts, token=token, text=text, upsample=upsample)

    def head_mlp(self, tokens: Tensor) -> Tensor:
        """The summary head: ``tokens (..., D)`` → ``(..., E)``. RADSeg applies it to every patch."""
        return self._part("head", "summary")(tokens)

    def feat_mlp(self, tokens: Tensor, grid: Size) -> Tensor:
        """The patch head: ``tokens (B, h·w, D)`` of a grid ``(h, w)`` → ``(B, h·w·u², E)``, row by row."""
        return self._part("features", "patch")(tokens, grid)

    def parts(self) -> dict[str, Any]:
        """The arguments of :meth:`from_state_dict` that make this adaptor again."""
        head, features = (part.state_dict() if part else {} for part in (self.head, self.features))
        return {"head": head, "features": features, "token": self.token, "text": self.text, "upsample": self.upsample}

    def _part(self, name: str, word: str) -> nn.Module:
        part: nn.Module | None = getattr(self, name)
        if part is None:
            raise IncompatibleModel(f"The adaptor must have a {word} head", got="a checkpoint without one")
        return part


def kind_of(state: Mapping[str, Tensor]) -> str | None:
    """``"v1"``, ``"v2"``, ``"attn"`` or None, by the keys."""
    marks = {"attn": "blocks.0.attn.qkv.weight", "v2": "final.2.weight", "v1": "fc2.weight"}
    return next((kind for kind, key in marks.items() if key in state), None)


def _step(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(inputs), nn.GELU(), nn.Linear(inputs, outputs))


def _count(state: Mapping[str, Any], pattern: str) -> int:
    number = 0
    while pattern.format(number) in state:
        number += 1
    return number


def _network(state: Mapping[str, Tensor], version: str | None, upsample: int, what: str) -> nn.Module:
    kind = kind_of(state)
    if kind is None or version not in (None, kind):
        raise InvalidCheckpoint(
            f"{what.capitalize()} of an adaptor is {version or 'one of ' + ', '.join(VERSIONS)}",
            got=kind or f"keys {', '.join(sorted(state)[:3])}",
        )
    try:
        with torch.device("meta"):
            module = _build(state, kind, upsample)
    except (KeyError, ValueError) as error:
        raise InvalidCheckpoint(f"{what.capitalize()} of an adaptor must be whole", got=f"{error}") from error
    check_keys(state, {key: value.shape for key, value in module.state_dict().items()}, f"{what} of an adaptor")
    module.load_state_dict(dict(state), assign=True)
    return module


def _build(state: Mapping[str, Tensor], kind: str, upsample: int) -> nn.Module:
    if kind == "attn":
        inner = {key.removeprefix("mlp."): value for key, value in state.items() if key.startswith("mlp.")}
        blocks = []
        for index in range(_count(state, "blocks.{}.attn.qkv.weight")):
            hidden, dim = state[f"blocks.{index}.mlp.fc1.weight"].shape
            if dim % ATTENTION_HEADS:
                raise ValueError(f"{dim} channels in {ATTENTION_HEADS} heads")
            options = {
                "bias": f"blocks.{index}.attn.qkv.bias" in state,
                "scale": f"blocks.{index}.ls1.gamma" in state,
            }
            blocks.append(Block(dim, hidden, ATTENTION_HEADS, **options))
        mlp = _build(inner, "v2", upsample)
        return AttentionMlp(blocks, mlp)  # type: ignore[arg-type]
    hidden, inputs = state["fc1.weight"].shape
    if kind == "v1":
        return Mlp1(inputs, hidden, len(state["fc2.weight"]), sum(f"inner.{3 * i}.weight" in state for i in range(99)))
    outputs, inner_blocks = len(state["final.2.weight"]), _count(state, "blocks.{}.0.weight")
    return Mlp2(inputs, hidden, outputs, inner_blocks, pre_norm="pre_norm.0.weight" in state, upsample=upsample)
