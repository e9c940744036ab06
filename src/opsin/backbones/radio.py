"""RADIO: one encoder distilled from several teachers, with a head (adaptor) that leads back to each of them.

AM-RADIO (arXiv:2312.06709), RADIOv2.5 (arXiv:2412.07679), C-RADIO; the network is ``RadioModel`` of ``transformers``.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin import hub
from opsin.backbones.adaptors import Adaptor, kind_of
from opsin.backbones.base import Backbone, BackboneOutput
from opsin.cards import ModelCard, catalogue
from opsin.errors import IncompatibleModel, InvalidCheckpoint
from opsin.geometry import Size

_GRIDS = 8  # position encodings kept: windows of one size need one, RADSeg+ two


class RadioBackbone(Backbone):
    """RADIO's features, its class tokens (one per teacher) and, where the weights have them, its adaptors.

    Any size of whole patches: the longer side spans the whole learned position table, the shorter its beginning.
    ``class_token`` of the output is the first class token, ``register_tokens`` all other tokens before the patches.
    """

    def __init__(
        self,
        model: nn.Module,
        card: ModelCard,
        *,
        folder: Path | None = None,
        adaptors: Mapping[str, Adaptor] | None = None,
    ) -> None:
        super().__init__(model, card)
        self.adaptors = nn.ModuleDict(dict(adaptors or {})).to(next(self.model.parameters()))
        self._folder = folder
        self._positions: dict[Size, Tensor] = {}
        self._stamp: tuple[object, ...] = ()

    def adaptor(self, name: str) -> Adaptor:
        """The heads of one teacher, read from the folder of the weights when first asked for.

        Raises:
            IncompatibleModel: these weights have no such adaptor.  InvalidCheckpoint: its file is damaged.
        """
        if name not in self.adaptors:
            if self._folder is None or name not in self.card.adaptors:
                raise self._no_adaptor(name)
            self.adaptors[name] = load_adaptor(adaptor_file(self._folder, name)).to(next(self.model.parameters()))
        return self.adaptors[name]  # type: ignore[return-value]

    def _no_adaptor(self, name: str) -> IncompatibleModel:
        there = sorted({*self.adaptors, *self.card.adaptors})
        having = [card.name for card in catalogue().values() if name in card.adaptors and card.kind == "backbone"]
        return IncompatibleModel(
            f'{self.name} must have an adaptor "{name}"', got=", ".join(there) or "no adaptor at all",
            remedy=f"Models that have it: {', '.join(having)}." if having else "No known model has it.",
        )

    def summary(self, output: BackboneOutput, adaptor: str) -> Tensor:
        """What the image as a whole is in the space of a teacher: ``(B, E)``, from that teacher's class token."""
        heads = self.adaptor(adaptor)
        return heads.head_mlp(self.prefix(output)[:, heads.token])

    @staticmethod
    def prefix(output: BackboneOutput) -> Tensor:
        """All tokens before the patches, ``(B, K, D)``: class tokens, then registers."""
        tokens = [output.class_token[:, None], output.register_tokens]  # type: ignore[index]
        return torch.cat([token for token in tokens if token is not None], 1)

    def positions(self, grid: Size) -> Tensor:
        """Position encoding ``(1, h·w, D)`` of a patch grid; kept for the last few grids until the weights change."""
        table: Tensor = self.model.embeddings.position_embedding
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and table.requires_grad):
            return interpolate_positions(table, grid)
        version = None if table.is_inference() else table._version
        address = None if table.device.type == "meta" else table.data_ptr()
        stamp = (address, version, table.dtype, table.device)
        if stamp != self._stamp or (len(self._positions) >= _GRIDS and grid not in self._positions):
            self._stamp, self._positions = stamp, {}
        found = self._positions.get(grid)
        if found is None:
            found = self._positions[grid] = interpolate_positions(table.detach(), grid)
        return found

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config, safetensors, preprocessing, card and adaptors; ``load("dir:…")`` reads them back."""
        with hub.atomic_path(folder) as temporary:
            self.model._weight_conversions = []  # keep the names of transformers, not those of the Hub repositories
            super().save_pretrained(temporary)
            for name in dict.fromkeys([*self.card.adaptors, *self.adaptors]):
                path = adaptor_file(temporary, name)
                if name in self.adaptors:
                    adaptor: Any = self.adaptors[name]
                    save_adaptor(path, **adaptor.parts())
                elif self._folder is not None:
                    path.parent.mkdir(exist_ok=True)
                    shutil.copyfile(adaptor_file(self._folder, name), path)

    def _features(self, pixels: Tensor) -> BackboneOutput:
        p, embeddings = self.patch_size, self.model.embeddings
        h, w = pixels.shape[-2] // p, pixels.shape[-1] // p
        patches = pixels.unflatten(3, (w, p)).unflatten(2, (h, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        patches = embeddings.patch_projection(patches) + self.positions((h, w))
        prefix = embeddings.cls_register_token.expand(len(pixels), -1, -1)
        tokens = self.model.encoder(torch.cat([prefix, patches], 1)).last_hidden_state
        before, patches = tokens.split([prefix.shape[1], h * w], 1)
        features = patches.transpose(1, 2).reshape(len(tokens), -1, h, w)
        return BackboneOutput(features, before[:, 0], before[:, 1:] if before.shape[1] > 1 else None)


def interpolate_positions(table: Tensor, grid: Size) -> Tensor:
    """A square position table ``(1, G·G, D)`` resampled to ``grid (h, w)``: ``(1, h·w, D)``.

    Bilinear to a square of the longer side, of which the top left is kept, in at least float32 (RADIO's rule when it is
    not training). The table itself, untouched, for the grid that it was learned on.
    """
    side = round(table.shape[1] ** 0.5)
    if grid == (side, side):
        return table
    dtype = table.dtype if table.dtype == torch.float64 else torch.float32
    cells = table.to(dtype).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    cells = F.interpolate(cells, size=(max(grid), max(grid)), mode="bilinear", align_corners=False)
    return cells[..., : grid[0], : grid[1]].flatten(2).transpose(1, 2).to(table.dtype).contiguous()


def adaptor_file(folder: Path, name: str) -> Path:
    """Where the adaptor ``name`` of the weights in ``folder`` is kept."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InvalidCheckpoint("An adaptor has a plain name", got=repr(name))
    return folder / "adaptors" / f"{name}.safetensors"


def adaptor_facts(path: Path) -> dict[str, Any]:
    """``token``, ``text`` and ``upsample`` of the adaptor in a file, without its weights."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(hub.check_file(path), "pt") as file:
            facts = file.metadata() or {}
        numbers = {key: int(facts.get(key, default)) for key, default in (("token", 0), ("upsample", 1))}
    except (SafetensorError, ValueError, OSError) as error:
        raise InvalidCheckpoint("The file of an adaptor must be whole", got=f"{path} ({error})") from error
    return {"text": facts.get("text", ""), **numbers}


def load_adaptor(path: Path) -> Adaptor:
    """The adaptor that :func:`save_adaptor` wrote to a file."""
    facts, weights = adaptor_facts(path), hub.load_safetensors(path)
    head, features = (
        {key.removeprefix(part): value for key, value in weights.items() if key.startswith(part)}
        for part in ("head.", "features.")
    )
    return Adaptor.from_state_dict(head, features, **facts)


def save_adaptor(
    path: Path,
    *,
    head: Mapping[str, Tensor],
    features: Mapping[str, Tensor],
    token: int = 0,
    text: str = "",
    upsample: int = 1,
) -> None:
    """Write the arguments of ``Adaptor.from_state_dict`` to one file, by rename."""
    from safetensors.torch import save_file

    tensors = {f"head.{key}": value for key, value in head.items()}
    tensors |= {f"features.{key}": value for key, value in features.items()}
    kinds = {"head_version": kind_of(head) or "", "features_version": kind_of(features) or ""}
    facts = {"format": "pt", "token": str(token), "text": text, "upsample": str(upsample), **kinds}
    with hub.atomic_path(path) as temporary:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary, facts)
