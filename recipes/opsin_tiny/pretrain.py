"""Train the opsin-tiny backbone from scratch: a small ResNet whose dense features are compared by cosine.

Every training canvas is a mosaic of photographs with a map that says which photograph (or which labelled region of
one) each pixel shows. A region token is the mean feature over such a region, exactly as the library pools it later,
and all losses act on the cosine of tokens and locations:

* class:    tokens and single locations name their class (cosine softmax; object and scene classes apart)
* group:    a location is nearer to the token of its own region than to the other regions of its canvas
* instance: every photograph occurs twice per batch, augmented apart; its two tokens find one another

Only torch, numpy, pillow, transformers and safetensors are needed. See README.md for the data layout.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from corpus import SLOTS, Data, load_data
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import ResNetBackbone, ResNetConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CANVAS, GRID = 128, 8  # canvas side and the stride of the finest output map, in pixels


def random_views(n: int, area: tuple[float, float], device: torch.device) -> Tensor:
    """(n, 2, 3) sampling matrices: random resized crop, aspect jitter and horizontal flip."""
    side = torch.empty(n, device=device).uniform_(*(math.log(a) for a in area)).exp().sqrt()
    aspect = torch.empty(n, device=device).uniform_(-0.3, 0.3).exp().sqrt()
    sx, sy = (side * aspect).clamp(max=1), (side / aspect).clamp(max=1)
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0] = sx * (1 - 2 * torch.randint(0, 2, (n,), device=device))
    theta[:, 1, 1] = sy
    theta[:, 0, 2] = (torch.rand(n, device=device) * 2 - 1) * (1 - sx)
    theta[:, 1, 2] = (torch.rand(n, device=device) * 2 - 1) * (1 - sy)
    return theta


def crop(images: Tensor, theta: Tensor, side: int, mode: str = "bilinear") -> Tensor:
    grid = F.affine_grid(theta, [len(theta), 1, side, side], align_corners=False)
    return F.grid_sample(images, grid, mode=mode, padding_mode="reflection", align_corners=False)


def colour_jitter(x: Tensor) -> Tensor:
    """Mild on purpose: colour is evidence of what a region is, so hue is only nudged by a white balance."""
    n = len(x)

    def rand(width: float, channels: int = 1) -> Tensor:
        return torch.empty(n, channels, 1, 1, device=x.device).uniform_(-width, width).exp()

    mean = x.mean((2, 3), keepdim=True)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (rand(0.4) * (torch.rand(n, 1, 1, 1, device=x.device) > 0.05))
    return (x - mean) * rand(0.35) + mean * rand(0.25) * rand(0.07, 3)


def standardise(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def whole(images: Tensor, side: int, device: torch.device) -> Tensor:
    """uint8 photographs as a network input of `side` pixels, without augmentation."""
    x = images.to(device).float() / 255
    return standardise(F.interpolate(x, size=side, mode="bilinear", antialias=True))


def tile(cells: Tensor, across: int) -> Tensor:
    """(n * across**2, C, s, s) -> (n, C, s * across, s * across)."""
    n, c, s = len(cells) // across**2, cells.shape[1], cells.shape[-1]
    cells = cells.view(n, across, across, c, s, s).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(n, c, s * across, s * across)


def make_batch(data: Data, canvases: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return canvases (B, 3, CANVAS, CANVAS), normalised, and the region key (B, h, w) at every location (-1: none).

    An eighth shows one object, a sixteenth sixteen small ones, a quarter crops of labelled scenes, the rest four
    objects each. Each photograph occurs twice, at places (and so mostly at sizes) drawn independently.
    """
    n1, n16, n_scene = canvases // 8, canvases // 16, canvases // 4
    n4 = canvases - n1 - n16 - n_scene
    cells = n1 + 4 * n4 + 16 * n16
    pick = torch.randint(len(data.objects), (cells // 2,)).repeat(2)[torch.randperm(cells // 2 * 2)]
    source = data.objects[pick].to(device).float().div_(255)
    key = pick.to(device)
    theta = random_views(len(pick), (0.25, 1.0), device)
    theta[:n1] = random_views(n1, (0.6, 1.0), device)  # enlarged most, so cropped least
    single = colour_jitter(crop(source[:n1], theta[:n1], CANVAS))
    small = colour_jitter(crop(source[n1:], theta[n1:], CANVAS // 2))
    four, sixteen = small[: 4 * n4], F.avg_pool2d(small[4 * n4 :], 2)

    named = (data.region_class >= 0).any(1)  # half of the scenes are to have classes
    odds = torch.where(named, 1 / max(1, int(named.sum())), 1 / max(1, int((~named).sum())))
    pick = torch.multinomial(odds, n_scene // 2, replacement=False).repeat(2)
    source = data.photos[data.region_photo[pick]].to(device).float().div_(255)
    theta = random_views(len(pick), (0.1, 1.0), device)
    # sampling 2x finer and averaging avoids aliasing: a scene is shown at down to 0.4 of its stored size
    scenes = colour_jitter(F.avg_pool2d(crop(source, theta, 2 * CANVAS), 2))
    slots = crop(data.regions[pick].to(device)[:, None].float(), theta, CANVAS, "nearest").long()
    scene_keys = len(data.objects) + pick.to(device)[:, None, None, None] * SLOTS + slots
    scene_keys[slots == 0] = -1

    images = torch.cat([single, tile(four, 2), tile(sixteen, 4), scenes])

    def spread(k: Tensor, side: int, across: int) -> Tensor:
        return tile(k[:, None, None, None].expand(-1, 1, side, side), across)

    split = [n1, n1 + 4 * n4]
    keys = torch.cat(
        [
            spread(key[: split[0]], CANVAS, 1),
            spread(key[split[0] : split[1]], CANVAS // 2, 2),
            spread(key[split[1] :], CANVAS // 4, 4),
            scene_keys,
        ]
    )
    # a random shift keeps the cells from always starting on the network's own grid
    shift = [int(s) for s in torch.randint(0, CANVAS // 4, (2,))]
    images, keys = images.roll(shift, (2, 3)), keys.roll(shift, (2, 3))
    # paste blobs of other canvases into half of the canvases, so that region boundaries take every shape
    noise = F.interpolate(torch.randn(canvases, 1, 5, 5, device=device), size=CANVAS, mode="bicubic")
    level = torch.where(torch.rand(canvases, 1, 1, 1, device=device) < 0.5, 0.6, 9.0)
    blob = noise > level
    other = torch.randperm(canvases).to(device)
    images, keys = torch.where(blob, images[other], images), torch.where(blob, keys[other], keys)
    return standardise(images), keys[:, 0, GRID // 2 :: GRID, GRID // 2 :: GRID]


class Model(nn.Module):
    """The backbone and the cosine classifiers that only training needs."""

    def __init__(self, args: argparse.Namespace, objects: int, scenes: int) -> None:
        super().__init__()
        stages = [f"stage{i}" for i in args.out_stages]
        self.backbone = ResNetBackbone(
            ResNetConfig(
                embedding_size=args.stem,
                hidden_sizes=args.widths,
                depths=args.depths,
                layer_type="basic",
                out_features=stages,
            )
        )
        width = sum(args.widths[i - 1] for i in args.out_stages)
        self.object_class = nn.Parameter(torch.randn(objects, width) * 0.05)
        self.scene_class = nn.Parameter(torch.randn(scenes, width) * 0.05)
        self.log_scale = nn.Parameter(torch.tensor(math.log(16.0)))

    def forward(self, images: Tensor) -> Tensor:
        """Dense features (B, D, h, w): all named stages on the grid of the first."""
        maps = self.backbone(images).feature_maps
        size = maps[0].shape[-2:]
        return torch.cat([maps[0]] + [F.interpolate(m, size=size, mode="bilinear") for m in maps[1:]], 1)

    def logits(self, unit: Tensor, scene: bool) -> Tensor:
        weight = F.normalize(self.scene_class if scene else self.object_class, dim=1)
        return self.log_scale.clamp(max=math.log(30.0)).exp() * unit @ weight.T


def losses(model: Model, features: Tensor, keys: Tensor, data: Data, key_class: Tensor) -> dict[str, Tensor]:
    """All losses of one batch; `key_class` gives the class of every region key (scene classes after objects)."""
    canvas = torch.arange(len(keys), device=keys.device)[:, None, None].expand_as(keys).reshape(-1)
    flat, key = features.float().permute(0, 2, 3, 1).flatten(0, 2), keys.reshape(-1)
    known = key >= 0
    flat, key, canvas = flat[known], key[known], canvas[known]
    stride = int(key_class.numel())
    code, region, count = torch.unique(canvas * stride + key, return_inverse=True, return_counts=True)
    token = torch.zeros(len(code), flat.shape[1], device=flat.device).index_add(0, region, flat) / count[:, None]
    token_key, token_canvas = code % stride, code // stride
    label = key_class[token_key]
    z = F.normalize(token, dim=1)
    pick = torch.randperm(len(flat), device=flat.device)[: len(flat) // 4]  # a quarter of the locations is plenty
    f, f_region = F.normalize(flat[pick], dim=1), region[pick]

    objects, large = len(data.object_names), count >= 3
    out: dict[str, Tensor] = {}
    for name, scene in (("object", False), ("scene", True)):
        own = (label >= objects) if scene else (label >= 0) & (label < objects)
        for kind, unit, target, mask in (("", z, label, own & large), ("_dense", f, label[f_region], own[f_region])):
            logits, want = model.logits(unit[mask], scene), target[mask] - (objects if scene else 0)
            # the sum over a batch with no such region is 0, not nan
            loss = F.cross_entropy(logits, want, label_smoothing=0.1, reduction="sum") / max(1, len(want))
            out[name + kind] = loss
            if not kind:
                out[f"acc_{name}"] = (logits.argmax(1) == want).float().sum().detach() / max(1, len(want))

    similar = f @ z.T / 0.1
    out["group"] = F.cross_entropy(similar.masked_fill(canvas[pick][:, None] != token_canvas, -1e4), f_region)

    z, token_key, label = z[large], token_key[large], label[large]
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    twin = (token_key[:, None] == token_key) & ~itself
    # other regions of the same class are neither twins nor strangers
    ignore = itself | ((label[:, None] == label) & (label >= 0) & ~twin)
    log_p = (z @ z.T / 0.1).masked_fill(ignore, -1e4).log_softmax(1)
    paired = twin.any(1)
    out["instance"] = -((log_p * twin).sum(1)[paired] / twin.sum(1)[paired]).mean()
    return out


@torch.no_grad()
def validate(model: Model, data: Data, device: torch.device) -> float:
    """Top-1 of held-out object photographs by their whole-image token."""
    model.eval()
    right = 0
    for images, want in zip(data.val.split(100), data.val_class.split(100), strict=True):
        z = F.normalize(model(whole(images, 64, device)).mean((2, 3)), dim=1)
        right += int((model.logits(z, False).argmax(1).cpu() == want).sum())
    return right / max(1, len(data.val))


@torch.no_grad()
def scale_stage(backbone: ResNetBackbone, stage: int, scale: float) -> None:
    """Multiply the output of one stage by `scale` without changing what the later stages compute.

    ReLU commutes with a positive factor, so the factor goes into every residual branch and into the shortcut, and is
    taken out again by the convolutions that read the result.
    """
    stages: Any = backbone.encoder.stages
    for i, layer in enumerate(stages[stage - 1].layers):
        branches = [layer.layer[-1]] + ([layer.shortcut] if i == 0 else [])
        if i == 0 and not hasattr(layer.shortcut, "normalization"):
            raise ValueError("the first stage has an identity shortcut and cannot be scaled")
        for branch in branches:
            branch.normalization.weight.mul_(scale)
            branch.normalization.bias.mul_(scale)
        if i > 0:
            layer.layer[0].convolution.weight.div_(scale)
    for reader in [stages[stage].layers[0]] if stage < len(stages) else []:
        reader.layer[0].convolution.weight.div_(scale)
        reader.shortcut.convolution.weight.div_(scale)


@torch.no_grad()
def export(model: Model, data: Data, folder: Path, device: torch.device, size: int) -> None:
    """Write config, fp16 weights and preprocessor so that the folder is always complete, by renames."""
    model = copy.deepcopy(model).eval()
    # unit root-mean-square per stage, measured on scenes: the consumer adds position codes of that size
    maps = model.backbone(whole(data.photos[:32], size, device)).feature_maps
    total = torch.cat([m.float().pow(2).mean((0, 2, 3)) for m in maps]).mean().sqrt()
    for name in model.backbone.config.out_features:
        scale_stage(model.backbone, int(re.findall(r"\d+", name)[0]), float(1 / total))
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    config = model.backbone.config
    config.architectures, config.dtype = ["ResNetBackbone"], "float16"
    config.save_pretrained(new)
    state = {k: v.cpu().contiguous() for k, v in model.backbone.state_dict().items()}
    state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_file(state, new / "model.safetensors", metadata={"format": "pt"})
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (new / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    (new / "model.safetensors").chmod(0o644)  # written for its owner only
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def save_state(path: Path, **state: object) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    data = load_data(args.data, args.threads, args.hold_out)
    objects = len(data.object_names)
    scene_class = torch.where(data.region_class >= 0, data.region_class + objects, -1)
    key_class = torch.cat([data.object_class, scene_class.flatten()]).to(device)
    args.out.mkdir(parents=True, exist_ok=True)

    model = Model(args, objects, len(data.scene_names)).to(device).to(memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False)
    decayed = [p for p in model.parameters() if p.ndim == 4]
    others = [p for p in model.parameters() if p.ndim != 4]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    step, spent, checkpoint = 0, 0.0, args.out / "checkpoint.pt"
    if checkpoint.exists() and not args.restart:
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
        torch.set_rng_state(state["rng"].cpu())
        print(f"resumed at step {step}", flush=True)
    million = sum(p.numel() for p in model.backbone.parameters()) / 1e6
    counts = f"{len(data.objects)} object photographs of {objects} classes, {len(data.photos)} scenes"
    print(f"{counts}; backbone of {million:.2f} M parameters on {device}", flush=True)

    def progress() -> float:
        return min(1.0, max(step / args.steps, spent / 60 / args.minutes if args.minutes else 0.0))

    weights = {"object": 1.0, "scene": args.scene, "group": args.group, "instance": args.instance}
    weights |= {"object_dense": args.dense, "scene_dense": args.scene * args.dense}
    totals: dict[str, Tensor] = {}
    clock = saved = time.monotonic()
    logged = step
    while (now := progress()) < 1:
        warm = min(1.0, (step + 1) / args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.5 * (1 + math.cos(math.pi * now)) * 0.99 + 0.01)
        model.train()
        images, keys = make_batch(data, args.canvases, device)
        with torch.autocast(device.type, torch.bfloat16):
            features = model(images)
        parts = losses(model, features, keys, data, key_class)
        loss = sum((weights[k] * v for k, v in parts.items() if k in weights), torch.zeros((), device=device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        step += 1
        rate = 1 - min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for old, new in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
                old.lerp_(new, rate) if old.is_floating_point() else old.copy_(new)
        for name, value in parts.items():
            totals[name] = totals.get(name, 0) + value.detach()
        if step % args.log_every == 0:
            took = time.monotonic() - clock
            shown = " ".join(f"{k} {float(v) / (step - logged):.3f}" for k, v in totals.items())
            print(f"step {step} {100 * now:.1f}% {took / (step - logged) * 1e3:.0f} ms/step {shown}", flush=True)
            spent, clock, logged, totals = spent + took, time.monotonic(), step, {}
        if time.monotonic() - saved > 60 * args.save_minutes or progress() >= 1:
            print(f"step {step} held-out object top-1 {validate(ema, data, device):.3f}", flush=True)
            export(ema, data, args.out / "backbone", device, args.size)
            trained = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(checkpoint, **trained, step=step, spent=spent, rng=torch.get_rng_state())
            saved = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets (see README.md)")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint.pt and backbone/")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=0, help="also end after this much training time (0: no limit)")
    parser.add_argument("--save-minutes", type=float, default=4)
    parser.add_argument("--restart", action="store_true", help="ignore an existing checkpoint.pt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="", help="default: cuda if there is one, else cpu")
    parser.add_argument("--canvases", type=int, default=64, help="canvases per step")
    parser.add_argument("--size", type=int, default=256, help="input side written to preprocessor_config.json")
    parser.add_argument("--stem", type=int, default=32)
    parser.add_argument("--widths", type=int, nargs="+", default=[48, 64, 192])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 5])
    parser.add_argument("--out-stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--ema", type=float, default=0.9985)
    parser.add_argument("--dense", type=float, default=0.5, help="weight of classes of single locations")
    parser.add_argument("--scene", type=float, default=0.5, help="weight of scene classes")
    parser.add_argument("--group", type=float, default=0.5)
    parser.add_argument("--instance", type=float, default=0.3)
    parser.add_argument("--hold-out", type=int, default=0, help="leave the first N COCO scenes out, to measure on")
    parser.add_argument("--log-every", type=int, default=100)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
