"""The training loop: losses of a batch, learning rate, clipping, exact resume, validation, logging."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from opsin import hub
from opsin.errors import InvalidConfig, MissingExtra, ResourceError
from opsin.images import to_pil
from opsin.runtime import progress, resolve_device
from opsin.training import losses
from opsin.training.config import RegionTrainingConfig
from opsin.training.data import Batch, Batches, loader

if TYPE_CHECKING:
    from accelerate import Accelerator


def learning_rate(step: int, *, peak: float, warmup: int, total: int, published: bool = False) -> float:
    """The rate of optimiser step ``step`` (from 0): linear warm-up to ``peak``, then half a cosine to 0 at ``total``.

    ``published=True`` starts the warm-up at 0 and does not stop the cosine at ``total`` (where REN's, being too small,
    makes the rate oscillate).
    """
    if step < warmup:
        return peak * (step + (not published)) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (done if published else min(1.0, done))))


def published_total(epochs: float, batches: int, batch_size: int) -> int:
    """The step count that REN's schedule assumes: the true one divided once more by the batch size."""
    return int(epochs * batches) // batch_size


def clip_factor(norm: float, limit: float, step: int, *, published: bool = False) -> float:
    """What gradients of ``norm`` are multiplied by so that they stay below ``limit`` (0: no limit).

    ``published=True`` clips as REN does, before the loss scale (2¹⁶, doubled every 2000 steps) is taken off.
    """
    if not limit:
        return 1.0
    scale = 2.0 ** (16 + step // 2000) if published else 1.0
    scaled = norm * scale
    if scaled**2 > torch.finfo(torch.float32).max:  # the scaled norm overflows, and clips everything away
        return 0.0
    return min(1.0, limit / (scaled + 1e-6))


class Objective(nn.Module):
    """Region encoder and losses of one batch; the losses see the batches of all processes as one."""

    def __init__(self, encoder: nn.Module, config: RegionTrainingConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder, self.config, self.dtype = encoder, config, dtype

    def forward(self, features: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Losses by name, ``loss`` being their weighted sum. ``features (B · 2, D, h, w)`` belong to ``batch``."""
        c = self.config
        with autocast(features.device, self.dtype):
            output = self.encoder(features, batch.points.flatten(0, 1))
        targets = losses.region_targets(features.float(), batch.masks.flatten(0, 1))
        pair = batch.ids.shape[:2]
        made = (output.pred_tokens, output.proj_tokens, targets)
        pred, proj, targets = (_gather(t.float().unflatten(0, pair)) for t in made)
        ids, categories = _gather(batch.ids), _gather(batch.categories)
        covered = (ids >= 0).float()
        # Null prompts of the two views must differ: REN numbers them -1 and -2.
        named = torch.where(ids >= 0, ids, ids.new_tensor([-1, -2])[:, None])
        parts = {
            "contrastive": losses.contrastive_loss(
                pred[:, 0], pred[:, 1], named[:, 0], named[:, 1], temperature=c.temperature, compat=c.compat
            ),
            "feature": losses.feature_loss(
                proj[:, 0], proj[:, 1], targets[:, 0], targets[:, 1], covered[:, 0], covered[:, 1]
            ),
        }
        if c.pred_feature_weight:
            parts["pred_feature"] = losses.target_loss(pred, targets, covered)
        if c.semantic_weight:
            flat, keys = pred.flatten(0, 1), (ids.flatten(0, 1), categories.flatten(0, 1))
            tokens, kinds, views = losses.region_means(flat, *keys)
            parts["semantic"] = losses.semantic_loss(tokens, kinds, views // 2, temperature=c.semantic_temperature)
        total = sum(getattr(c, f"{name}_weight") * value for name, value in parts.items())
        return {"loss": torch.as_tensor(total), **parts}


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """Autocast to ``dtype``, or nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def _gather(tensor: Tensor) -> Tensor:
    """The tensors of all processes joined along the batch, with gradients."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    if tensor.requires_grad:
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(tensor.contiguous()))
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def open_accelerator(device: str | None) -> Accelerator:
    """The processes of a run, on ``device`` or the machine's own choice. ``MissingExtra`` without accelerate."""
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingExtra.of("accelerate", "train", "train") from error
    return Accelerator(cpu=resolve_device(device).type == "cpu")


class Run:
    """What training regions and training codecs have in common: the state of a run, saved and taken up again."""

    config: Any
    accelerator: Accelerator
    folder: Path  # for state.pt, log.jsonl and tracking
    optimizer: torch.optim.Optimizer
    step: int
    best: float
    skipped: dict[str, str]

    # What may differ between a run and its continuation: where and how often, not what is computed.
    free = frozenset({"out", "name", "workers", "cache_mb", "device", "save_every", "resume", "tracker", "keep"})

    def options(self) -> dict[str, Any]:
        """What the run depends on; ``free`` names those that may change."""
        return self.config.to_dict()

    def seed(self, micro: int) -> None:
        """Seed dropout by the place in the run alone: after a restart it goes on as if there had been none."""
        torch.manual_seed(hash((self.config.seed, self.step, micro, self.accelerator.process_index)) % 2**63)

    def save(self, **parts: Any) -> None:
        """Write ``state.pt``: ``parts`` beside what every run has. Only the main process does."""
        if not self.accelerator.is_main_process:
            return
        state = {"step": self.step, "best": self.best, "skipped": self.skipped, "options": self.options()}
        with hub.atomic_path(self.folder / "state.pt") as path:
            torch.save({**state, "optimizer": self.optimizer.state_dict(), **parts}, path)

    def resume(self, model: nn.Module, name: str) -> dict[str, Any]:
        """Take up the saved state, with the weights ``name`` of it into ``model``; empty where there is no state.

        Raises ``InvalidConfig`` when an option differs that must not.
        """
        path = self.folder / "state.pt"
        if not path.exists():
            return {}
        state = hub.load_pickle(path)
        begun = state.get("options") or state["config"]  # as older states of regions call them
        same_options(self.options(), begun, self.free)
        model.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best, self.skipped = state["step"], state["best"], dict(state["skipped"])
        return state


@dataclass
class Loop(Run):
    """One training run. ``export(encoder)`` writes the model; ``folder`` holds state.pt, log.jsonl and tracking."""

    config: RegionTrainingConfig
    accelerator: Accelerator
    backbone: nn.Module
    encoder: nn.Module
    train: Batches
    val: Batches | None
    folder: Path
    dtype: torch.dtype
    export: Callable[[nn.Module], None]

    free = Run.free | {"embed_backbone"}

    def __post_init__(self) -> None:
        c, count = self.config, len(self.train)
        self.total = c.steps or max(1, int(c.epochs * count / c.accumulation))
        self.horizon = self.total
        if c.compat == "published":
            self.horizon = published_total(self.total * c.accumulation / count, count, c.batch_size)
        self.step, self.best = 0, math.inf
        self.skipped: dict[str, str] = {}
        trained = [p for p in self.encoder.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=c.lr, weight_decay=c.weight_decay)

    def run(self) -> dict[str, Any]:
        """Train to the last step, from a saved state where there is one. Returns the summary of the run."""
        c, accelerator = self.config, self.accelerator
        self.encoder.to(accelerator.device)
        if c.resume:
            self.resume(self.encoder, "encoder")
        model = accelerator.prepare(Objective(self.encoder, c, self.dtype))
        batches = loader(self.train, self.step * c.accumulation, self.total * c.accumulation, c.workers)
        stream, last = iter(batches), {}
        with open_log(c, self.folder, self.step, accelerator.is_main_process) as log:
            left = range(self.step, self.total)
            for _ in progress(left, total=len(left), description="train", unit="step"):
                started = time.perf_counter()
                last = self._step(model, stream)
                self.step += 1
                log({**last, "seconds": time.perf_counter() - started}, self.step)
                if self.val is not None and (self.step % c.validate_every == 0 or self.step == self.total):
                    result = self._validate(model)
                    better = result["loss"] <= self.best
                    self.best = min(self.best, result["loss"])
                    if better and c.keep == "best" and accelerator.is_main_process:
                        self.export(self.encoder)
                    log({f"val_{k}": v for k, v in result.items()}, self.step)
                if self.step % c.save_every == 0 or self.step == self.total:
                    if accelerator.is_main_process and (self.val is None or c.keep == "last"):
                        self.export(self.encoder)
                    self.save(encoder=self.encoder.state_dict())
        accelerator.wait_for_everyone()
        best = None if math.isinf(self.best) else self.best
        return {"steps": self.step, "loss": last.get("loss"), "best_val_loss": best, "skipped": self.skipped}

    def _step(self, model: nn.Module, stream: Iterator[Batch]) -> dict[str, float]:
        c = self.config
        published = c.compat == "published"
        model.train()
        sums: dict[str, Tensor] = {}
        for micro in range(c.accumulation):
            batch = self._next(stream)
            self.seed(micro)
            waits = micro + 1 < c.accumulation
            with self.accelerator.no_sync(model) if waits else nullcontext():
                found = model(self._features(batch), batch)
                self.accelerator.backward(found["loss"] / c.accumulation)
            for name, value in found.items():
                sums[name] = sums.get(name, 0) + value.detach() / c.accumulation
        loss = float(sums["loss"])
        need_finite(loss, self.step)
        norm = float(nn.utils.get_total_norm([p.grad for p in self._trained() if p.grad is not None]))
        factor = clip_factor(norm, c.max_grad_norm, self.step, published=published)
        if factor != 1:
            torch._foreach_mul_([p.grad for p in self._trained() if p.grad is not None], factor)
        rate = learning_rate(self.step, peak=c.lr, warmup=c.warmup_steps, total=self.horizon, published=published)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {**{k: float(v) for k, v in sums.items()}, "lr": rate, "grad_norm": norm}

    def _trained(self) -> list[nn.Parameter]:
        return self.optimizer.param_groups[0]["params"]

    def _next(self, stream: Iterator[Batch]) -> Batch:
        batch = next(stream)
        self.skipped.update(batch.skipped)
        return batch.to(self.accelerator.device)

    @torch.no_grad()
    def _features(self, batch: Batch) -> Tensor:
        with autocast(batch.images.device, self.dtype):
            features = self.backbone(batch.images.flatten(0, 1)).features
        # The encoder reads cells, each a row of D numbers: laid out so, its attention takes the fast path.
        return features.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def _validate(self, model: nn.Module) -> dict[str, float]:
        """Mean losses over the same batches every time, without dropout."""
        model.eval()
        sums: dict[str, float] = {}
        count = self.config.validation_batches
        stream = iter(loader(self.val, 0, count, 0))  # type: ignore[arg-type]
        for _ in range(count):
            batch = self._next(stream)
            for name, value in model(self._features(batch), batch).items():
                sums[name] = sums.get(name, 0.0) + float(value) / count
        return sums


def need_finite(loss: float, step: int) -> None:
    """``ResourceError`` for a loss that is infinite or not a number."""
    if not math.isfinite(loss):
        raise ResourceError(
            "The training loss stays finite", got=f"{loss} at step {step}", remedy="Lower lr, or use dtype=float32."
        )


def same_options(now: Mapping[str, Any], then: Mapping[str, Any], free: Collection[str]) -> None:
    """``InvalidConfig`` when an option other than the ``free`` ones differs from what the run was begun with."""
    for key, value in now.items():
        if key not in free and value != then.get(key):
            raise InvalidConfig(
                f"A run goes on with the options it was begun with; {key} was {then.get(key)!r}",
                got=repr(value),
                remedy="Give the old value, another out, or resume=false to begin again.",
            )


Record = Callable[[Mapping[str, Any], int], None]  # values by name, and the step that they belong to


@contextmanager
def open_log(config: Any, folder: Path, step: int, writes: bool = True) -> Iterator[Record]:
    """A function that writes values of a step to ``log.jsonl`` and the tracker; with ``writes=False`` it does nothing.

    Images ``(3, H, W)`` go to the tracker only. What was logged after ``step`` by a run that was killed is dropped.
    """
    if not writes:
        yield lambda values, step: None
        return
    path = folder / "log.jsonl"
    _forget_after(path, step)
    with path.open("a") as file, tracker(config, folder) as track:

        def log(values: Mapping[str, Any], step: int) -> None:
            numbers = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
            if numbers:
                file.write(json.dumps({"step": step, **numbers}) + "\n")
                file.flush()
            track(values, step)

        yield log


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps that a killed run had logged but not saved, and a line that was cut off."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step and step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    with hub.atomic_path(path) as temporary:
        temporary.write_text("".join(kept))


@contextmanager
def tracker(config: Any, folder: Path) -> Iterator[Record]:
    """A function that records numbers and images at a step with what ``config.tracker`` names; nothing for ``none``."""
    if config.tracker == "tensorboard":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtra.of("tensorboard", "train", "track a training run") from error
        with SummaryWriter(str(folder / "tensorboard")) as writer:

            def write(values: Mapping[str, Any], step: int) -> None:
                for name, value in values.items():
                    (writer.add_image if isinstance(value, Tensor) else writer.add_scalar)(name, value, step)

            yield write
    elif config.tracker == "wandb":
        try:
            import wandb
        except ImportError as error:
            raise MissingExtra.of("wandb", "wandb", "track a training run") from error
        mode = os.environ.get("WANDB_MODE", "offline")
        project = getattr(config, "project", "opsin")
        with wandb.init(project=project, name=config.name, dir=folder, config=config.to_dict(), mode=mode) as run:

            def send(values: Mapping[str, Any], step: int) -> None:
                shown = {k: wandb.Image(to_pil(v)) if isinstance(v, Tensor) else v for k, v in values.items()}
                run.log(shown, step=step)

            yield send
    else:
        yield lambda values, step: None
