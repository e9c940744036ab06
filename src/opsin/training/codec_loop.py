"""The training loop of a codec: losses, learning rates, averaged weights, exact resume, validation, samples."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from opsin.codec.layers import Block
from opsin.codec.measures import psnr, ssim
from opsin.codec.patches import unpatchify
from opsin.errors import InvalidDataset, OpsinError
from opsin.images import save_image
from opsin.runtime import fast_matmul, progress
from opsin.training.codec_config import CodecTrainingConfig
from opsin.training.codec_data import ImageBatch, PhotoBatches, StreamBatches, stack
from opsin.training.data import loader
from opsin.training.loop import Run, autocast, clip_factor, need_finite, open_log

if TYPE_CHECKING:
    from accelerate import Accelerator

    from opsin.codec import Codec


def learning_rate(done: float, *, peak: float, low: float, warmup: float, total: float) -> float:
    """The rate after ``done`` passes: linear warm-up to ``peak``, then half a cosine to ``low`` at ``total``."""
    if done < warmup:
        return peak * done / warmup
    share = min(1.0, (done - warmup) / max(total - warmup, 1e-9))
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * share))


class Objective(nn.Module):
    """The codec and its losses on a batch of images in [0, 1]."""

    def __init__(self, codec: Codec, config: CodecTrainingConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.codec, self.dtype = codec, dtype
        self.weights = (config.bottleneck_weight, config.full_weight)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``loss`` and its parts, see ``Codec.losses``."""
        with autocast(images.device, self.dtype):
            return self.codec(self.codec.normalise(images), self.weights)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images in [0, 1] after one vector each: ``(B, 3, H, W)`` in [0, 1]."""
        encoder, decoder = self.codec.encoder, self.codec.decoder
        with autocast(images.device, self.dtype):
            patches = decoder(encoder.bottleneck(self.codec.normalise(images)))
        return self.codec.denormalise(unpatchify(patches.float(), decoder.patch, decoder.grid))


def parameter_groups(codec: Codec, config: CodecTrainingConfig) -> list[dict[str, Any]]:
    """Parameters by learning rate (``scale`` of the peak) and weight decay, which is for matrices alone.

    Published: everything decays, biases, norms, class token and queries too.
    """
    groups = []
    for part, scale in ((codec.encoder, config.encoder_lr), (codec.decoder, 1.0)):
        named = [(n, p) for n, p in part.named_parameters() if p.requires_grad]
        decays = [config.compat == "published" or (p.ndim > 1 and n.endswith("weight")) for n, p in named]
        for wanted in (True, False):
            members = [p for (_, p), decay in zip(named, decays, strict=True) if decay is wanted]
            if members:
                groups.append(
                    {"params": members, "scale": scale, "weight_decay": config.weight_decay if wanted else 0.0}
                )
    return groups


class Average:
    """Weights averaged over the steps, starting fast: the decay is at most ``(1 + step) / (10 + step)``."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values = [p.detach().clone() for p in parameters] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` steps."""
        if self.decay:
            share = 1 - min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.values, list(self.parameters), share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the parameters have the averaged values."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, parameter in enumerate(self.parameters if self.decay else ()):
            parameter.data, self.values[i] = self.values[i], parameter.data


@dataclass
class CodecLoop(Run):
    """One training run. ``out`` takes the model, its sub-folder training state.pt, log.jsonl, samples and tracking."""

    config: CodecTrainingConfig
    accelerator: Accelerator
    codec: Codec
    train: PhotoBatches | StreamBatches
    val: PhotoBatches | None
    out: Path
    dtype: torch.dtype

    free = Run.free | {"project", "checkpointing", "samples"}

    def __post_init__(self) -> None:
        c, world = self.config, self.accelerator.num_processes
        self.folder = self.out / "training"
        self.peak = c.peak_rate(world)
        self.per_pass = self.train.per_pass / c.accumulation  # optimiser steps
        self.total = c.steps or max(1, math.ceil(c.epochs * self.per_pass))
        self.epochs = self.total / self.per_pass if c.steps else c.epochs
        self.interval = max(1, round(c.validate_every * self.per_pass))
        self.step, self.best = 0, -math.inf
        self.skipped: dict[str, str] = {}
        self.codec.to(self.accelerator.device)
        self.codec.decoder.mae_decoder.mask_token.requires_grad_(False)  # belongs to the format; nothing uses it
        for part in self.codec.modules():
            if isinstance(part, nn.Dropout):
                part.p = c.dropout
            elif isinstance(part, Block) and c.checkpointing:
                part.forward = partial(checkpoint, part.forward, use_reentrant=False)  # type: ignore[method-assign]
        first, second = c.betas
        groups = parameter_groups(self.codec, c)
        self.optimizer = torch.optim.AdamW(groups, lr=self.peak, betas=(first, second), fused=True)
        self.average = Average([p for group in self.optimizer.param_groups for p in group["params"]], c.ema)
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=self.dtype == torch.float16)

    def run(self) -> dict[str, Any]:
        """Train to the last step, from a saved state where there is one. Returns the summary of the run."""
        c, accelerator = self.config, self.accelerator
        if c.resume:
            self._resume()
        objective = Objective(self.codec, c, self.dtype)
        model = accelerator.prepare(objective)
        stream, last, main = self._stream(), {}, accelerator.is_main_process
        with open_log(c, self.folder, self.step, main) as log, fast_matmul():
            left = range(self.step, self.total)
            for _ in progress(left, total=len(left), description="train", unit="step"):
                started = time.perf_counter()
                last = self._step(model, stream)
                self.step += 1
                log({**last, "seconds": time.perf_counter() - started}, self.step)
                if self.val is not None and (self.step % self.interval == 0 or self.step == self.total):
                    with self.average.applied():
                        result, shown = self._validate(objective)
                        better = result["val_psnr"] >= self.best
                        self.best = max(self.best, result["val_psnr"])
                        if main and better and c.keep == "best":
                            self.codec.save_pretrained(self.out)
                    log({**result, **({} if shown is None else {"samples": shown})}, self.step)
                if self.step % c.save_every == 0 or self.step == self.total:
                    self._save()
        accelerator.wait_for_everyone()
        best = None if math.isinf(self.best) else self.best
        return {"steps": self.step, "loss": last.get("loss"), "best_val_psnr": best, "skipped": self._all_skipped()}

    def _stream(self) -> Iterator[ImageBatch]:
        c = self.config
        start, stop = self.step * c.accumulation, self.total * c.accumulation
        if isinstance(self.train, PhotoBatches):
            return iter(loader(self.train, start, stop, c.workers))
        self.train.start = start
        options: dict[str, Any] = {"multiprocessing_context": "spawn"} if c.workers else {}
        return iter(DataLoader(self.train, batch_size=None, num_workers=min(1, c.workers), **options))

    def _step(self, model: nn.Module, stream: Iterator[ImageBatch]) -> dict[str, float]:
        c, accelerator = self.config, self.accelerator
        self.codec.train()
        sums: dict[str, Tensor] = {}
        for micro in range(c.accumulation):
            batch = next(stream)
            self.skipped.update(batch.skipped)
            images = batch.images.to(accelerator.device, next(self.codec.parameters()).dtype, non_blocking=True)
            self.seed(micro)
            with accelerator.no_sync(model) if micro + 1 < c.accumulation else nullcontext():
                found = model(images)
                accelerator.backward(self.scaler.scale(found["loss"] / c.accumulation))
            for name, value in found.items():
                sums[name] = sums.get(name, 0) + value.detach() / c.accumulation
        values = {n: float(v) for n, v in accelerator.reduce(sums, "mean").items()}
        need_finite(values["loss"], self.step)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.average.parameters if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        factor = clip_factor(norm, c.max_grad_norm, self.step)
        if factor != 1:
            torch._foreach_mul_(gradients, factor)
        done = (self.step + (c.compat is None)) / self.per_pass  # published: the first step has no rate at all
        rate = learning_rate(done, peak=self.peak, low=c.min_lr, warmup=c.warmup_epochs, total=self.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.step + 1)
        return {**values, "lr": rate, "grad_norm": norm}

    @torch.no_grad()
    def _validate(self, objective: Objective) -> tuple[dict[str, float], Tensor | None]:
        """Mean PSNR and SSIM of the validation photographs, which the processes share, and some of them as a picture.

        The picture ``(3, 2 · H, n · W)`` has photographs above and their reconstructions below.
        """
        c, val, accelerator = self.config, self.val, self.accelerator
        if val is None:
            return {}, None
        self.codec.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        shown: list[Tensor] = []
        mine = range(accelerator.process_index, len(val.chosen), accelerator.num_processes)
        for start in range(0, len(mine), c.batch_size):
            views = []
            for index in mine[start : start + c.batch_size]:
                try:
                    views.append(val.whole(index))
                except OpsinError as error:
                    self.skipped[val.label(index)] = str(error)
            if not views:
                continue
            images = stack(views).to(accelerator.device)
            again = objective.reconstruct(images.to(next(self.codec.parameters()).dtype))
            sums += torch.stack([psnr(again, images).sum(), ssim(again, images).sum(), torch.tensor(len(views))]).cpu()
            shown += [torch.cat([a, b], 1).cpu() for a, b in zip(images, again, strict=True)][: c.samples - len(shown)]
        total = accelerator.reduce(sums.float().to(accelerator.device), "sum").double()
        if not total[2]:
            raise InvalidDataset("A validation photograph can be read", got=f"none of {len(val.chosen)}")
        values = {"val_psnr": float(total[0] / total[2]), "val_ssim": float(total[1] / total[2])}
        if not shown or not accelerator.is_main_process:
            return values, None
        picture = torch.cat(shown, 2)
        save_image(picture, self.folder / "samples" / f"step-{self.step:07d}.png")
        return values, picture

    def _all_skipped(self) -> dict[str, str]:
        if self.accelerator.num_processes == 1:
            return self.skipped
        from accelerate.utils import gather_object

        return {name: reason for part in gather_object([self.skipped]) for name, reason in part.items()}

    def options(self) -> dict[str, Any]:
        """Those of the configuration, and the number of processes."""
        return {**super().options(), "processes": self.accelerator.num_processes}

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            with self.average.applied():
                beside = self.val is not None and self.config.keep == "best"
                self.codec.save_pretrained(self.out / "last" if beside else self.out)
        parts = {"codec": self.codec.state_dict(), "scaler": self.scaler.state_dict()}
        self.save(average=self.average.values, **parts)

    def _resume(self) -> None:
        state = self.resume(self.codec, "codec")
        if state:
            self.scaler.load_state_dict(state["scaler"])
            saved = zip(state["average"], self.average.parameters, strict=False)  # none without averaging
            self.average.values = [value.to(parameter, copy=True) for value, parameter in saved]
