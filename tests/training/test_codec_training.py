"""Options, photographs, batches, schedule, exact resume after a kill, several processes, and that training learns."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opsin.codec import Codec, CodecConfig, patchify, unpatchify
from opsin.codec.measures import psnr
from opsin.errors import InvalidConfig, InvalidDataset, MissingFile, ModelUnavailable, UnsupportedSize
from opsin.hub import load_pickle
from opsin.training import codec_data as cd
from opsin.training.codec import start_as_patches, train_codec
from opsin.training.codec_config import CodecTrainingConfig, load_codec_config, recipes
from opsin.training.codec_loop import CodecLoop, learning_rate, parameter_groups
from tests.conftest import draw, golden_input, golden_path
from tests.training.conftest import environment, losses_of, run_and_kill, words

RUN = (
    "import sys; from opsin.training.codec_config import load_codec_config; from opsin.training.codec import "
    "train_codec; train_codec(load_codec_config(sys.argv[1:]))"
)


def paint(seed: int, size=(40, 56)) -> Image.Image:
    """A photograph of two colours."""
    rng = np.random.default_rng(seed)
    pixels = np.broadcast_to(rng.integers(0, 255, 3, dtype=np.uint8), (*size, 3)).copy()
    pixels[:, rng.integers(10, 40) :] = rng.integers(0, 255, 3)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """24 photographs of many formats in nested folders, a text file, and two photographs that cannot be read."""
    root = tmp_path_factory.mktemp("photos")
    suffixes = ("jpg", "png", "webp", "bmp", "tif", "gif")
    for number in range(22):
        folder = root / f"room{number % 3}" / "deep"
        folder.mkdir(parents=True, exist_ok=True)
        paint(number).save(folder / f"{number}.{suffixes[number % 6]}")
    (root / "notes.txt").write_text("no photograph")
    (root / "broken.jpg").write_bytes(b"no photograph either")
    whole = io.BytesIO()
    paint(99).save(whole, "jpeg")
    (root / "cut.jpg").write_bytes(whole.getvalue()[:300])
    return root


@pytest.fixture
def options(photos, tmp_path):
    """Keyword arguments of a run that takes a second."""
    return {
        "out": str(tmp_path / "model"),
        "train": (str(photos),),
        "holdout": 0.2,
        "size": "custom",
        "patch_size": 8,
        "dim": 32,
        "layers": 2,
        "heads": 4,
        "decoder_dim": 32,
        "decoder_layers": 1,
        "decoder_heads": 4,
        "image_size": (16,),
        "batch_size": 4,
        "steps": 6,
        "warmup_epochs": 0.5,
        "blr": 0.05,
        "dtype": "float32",
        "device": "cpu",
    }


def train(options, **changes):
    return train_codec(CodecTrainingConfig(**{**options, **changes}))


# Options


def test_published_overrides_are_understood():
    config = load_codec_config(
        ["train_cfg=finetune", "model.img_size=512", "model.act_fn=relu", "data.dataset=rooms", "train_cfg.epochs=50",
         "train_cfg.full_mae_loss_coeff=0.5", "run_name=mine", "out=x"]
    )  # fmt: skip
    assert (config.image_size, config.activation, config.train) == ((512,), "relu", ("rooms",))
    assert (config.epochs, config.full_weight, config.name, config.batch_size) == (50, 0.5, "mine", 16)
    assert config.val == ()  # the recipe's belongs to its own photographs


def test_files_may_have_the_published_sections(tmp_path):
    (tmp_path / "c.yaml").write_text("train_cfg: {epochs: 3, accum_iter: 2}\nmodel: {img_size: 64}\nout: x\n")
    config = load_codec_config(["epochs=4"], tmp_path / "c.yaml", "train")
    assert (config.epochs, config.accumulation, config.image_size, config.blr) == (4, 2, (64,), 1e-5)


def test_every_recipe_is_a_configuration():
    assert set(recipes()) == {"train", "finetune", "published-train", "published-finetune"}
    for name in recipes():
        config = load_codec_config(["out=x"], recipe=name)
        rises = config.min_lr > config.peak_rate()
        assert rises == (name == "published-finetune")  # its rate goes up from 6.25e-5 to 1e-4
    corrected = load_codec_config(["out=x"], recipe="train")
    published = load_codec_config(["out=x"], recipe="published-train")
    assert (corrected.encoder_lr, published.encoder_lr) == (0.1, 1)
    assert corrected.peak_rate() == published.peak_rate() == pytest.approx(4e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train=a"], '"out" must be given'),
        (["out=x"], '"train" must be given'),
        (["out=x", "train=a", "epoch=3"], 'Did you mean "epochs"'),
        (["out=x", "train=a", "model.image=3"], "known names"),
        (["out=x", "train=a", "train_cfg=finetun"], 'Did you mean "finetune"'),
        (["out=x", "train=a", "train_cfg.resume_optimizer=true"], "goes on by itself"),
        (["out=x", "train=a", "distributed.rank=1"], "torchrun"),
        (["out=x", "train=a", "size=tiny"], "size is one of"),
        (["out=x", "train=a", "size=custom", "dim=8"], "all its numbers"),
        (["out=x", "train=a", "dim=8"], "belongs to size=custom"),
        (["out=x", "train=a", "size=custom", "init=mae"], "weights of MAE"),
        (["out=x", "train=a", "image_size=[1,2,3]"], "a side or"),
        (["out=x", "train=a", "batch_size=many"], "batch_size is of type"),
        (["out=x", "train=a", "ema=2"], "ema lies in"),
        (["out=x", "train=a", "betas=[0.9]"], "two numbers"),
    ],
)
def test_wrong_options(words, message):
    with pytest.raises(InvalidConfig, match=message):
        load_codec_config(words)


def test_a_rate_that_would_rise_is_refused():
    with pytest.raises(InvalidConfig, match="min_lr is at most"):
        CodecTrainingConfig(out="x", train=("a",), min_lr=0.1).peak_rate()


# Photographs and batches


def test_a_folder_is_read_recursively_in_all_formats(photos):
    source = cd.open_photographs(str(photos))
    assert len(source) == 24
    assert {Path(source.label(i)).suffix for i in range(24)} == {".jpg", ".png", ".webp", ".bmp", ".tif", ".gif"}


def test_zip_files_parts_and_lists(photos, tmp_path):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for folder, number in (("train", 1), ("train", 2), ("val", 3)):
            file = io.BytesIO()
            paint(number).save(file, "png")
            archive.writestr(f"{folder}/{number}.png", file.getvalue())
        archive.writestr("list.txt", "train/2.png\r\nval/3.png\n")
    names = [cd.open_photographs(f"{tmp_path}/p.zip{part}").members for part in ("@train", "@list.txt", "")]
    assert [len(n) for n in names] == [2, 2, 3]
    with pytest.raises(InvalidDataset, match="holds photographs"):
        cd.open_photographs(f"{tmp_path}/p.zip@test")
    with pytest.raises(MissingFile):
        cd.open_photographs(str(tmp_path / "nowhere"))


def test_tiny_imagenet_lies_where_the_published_code_looks_for_it(tmp_path, monkeypatch):
    for place in ("train/n01/images/a.JPEG", "val/images/b.JPEG", "val/images/c.JPEG"):
        path = tmp_path / "data/tiny-imagenet-200" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        paint(1).save(path, "jpeg")
    monkeypatch.chdir(tmp_path)
    assert len(cd.open_photographs("tiny-imagenet-200")) == 1
    assert len(cd.open_photographs("tiny-imagenet-200@val")) == 2


def test_panoramas_are_turned_and_never_cropped(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 5] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "dataset_config.json").write_text('{"dataset_type": "panorama"}')
    source = cd.open_photographs(str(tmp_path))
    assert source.panorama
    assert cd.open_photographs(f"panorama:{tmp_path}").panorama
    batches = cd.PhotoBatches([source], cd.Crops((8, 16)), batch_size=32)
    bright = batches[0].images.amax((1, 2)) == 1
    assert (bright.sum(1) == 1).all()  # the line is whole, somewhere
    assert len({int(row.nonzero()) for row in bright}) > 5
    published = cd.PhotoBatches([source], cd.Crops((8, 16), published=True), batch_size=4)
    assert (published[0].images.amax((1, 2))[:, 5] == 1).all()


def test_batches_depend_on_their_number_alone_and_processes_share_them(photos):
    source = [cd.open_photographs(str(photos))]
    crops = cd.Crops((16, 16))
    one, again = (cd.PhotoBatches(source, crops, batch_size=8, seed=3) for _ in range(2))
    late = one[7].images
    assert torch.equal(late, again[7].images)
    halves = [cd.PhotoBatches(source, crops, batch_size=4, seed=3, rank=r, world=2)[7].images for r in range(2)]
    assert torch.equal(torch.cat(halves), late)
    assert not torch.equal(late, cd.PhotoBatches(source, crops, batch_size=8, seed=4)[7].images)


def test_every_photograph_comes_once_per_pass_also_where_batches_do_not_fit(photos):
    batches = cd.PhotoBatches([cd.open_photographs(str(photos))], cd.Crops((16, 16)), batch_size=7)
    seen: list[int] = []
    batches._read = lambda index, rng, skipped: (seen.append(index), (paint(0), False))[1]
    assert batches.per_pass == 24 / 7
    for number in range(7):
        batches[number]
    assert sorted(seen[:24]) == sorted(seen[24:48]) == list(range(24))
    assert seen[:24] != seen[24:48]


def test_broken_photographs_are_reported_and_never_black(photos):
    batches = cd.PhotoBatches([cd.open_photographs(str(photos))], cd.Crops((16, 16), area=1.0), batch_size=24)
    batch = batches[0]
    assert {name for name, _ in batch.skipped} == {"broken.jpg", "cut.jpg"}
    assert batch.images.shape == (24, 3, 16, 16)
    assert (batch.images.flatten(1).amax(1) > 0.05).all()


def test_nothing_readable(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    batches = cd.PhotoBatches([cd.open_photographs(str(tmp_path))], cd.Crops((16, 16)), batch_size=1)
    with pytest.raises(InvalidDataset, match="can be read"):
        batches[0]


def test_views_lie_inside_and_follow_the_size():
    picture = paint(1, (30, 90))
    for size in ((16, 16), (16, 32), (48, 16)):
        crops = cd.Crops(size, area=0.3)
        rng = np.random.default_rng(0)
        for _ in range(50):
            x0, y0, x1, y1 = crops._box(90, 30, rng)
            assert 0 <= x0 < x1 <= 90
            assert 0 <= y0 < y1 <= 30
            aspect = (x1 - x0) / (y1 - y0) / (size[1] / size[0])
            assert 0.74 < aspect < 1.34
        assert crops.draw(picture, rng).shape == crops.whole(picture).shape == (*size, 3)


def test_held_out_photographs_stay_the_same_when_others_come(photos, tmp_path):
    source = cd.open_photographs(str(photos))
    train_, held = cd.hold_out([source], 0.3)
    assert sorted(train_ + held) == [(0, i) for i in range(24)]
    names = {source.label(i) for _, i in held}
    assert 2 <= len(names) <= 14
    fewer = cd.open_photographs(f"{photos}@room0")
    assert {fewer.label(i) for _, i in cd.hold_out([fewer], 0.3)[1]} <= names
    assert cd.hold_out([source], 0.0)[1] == []
    assert len(cd.hold_out([source], 1e-9)[1]) == 1


class Stream:
    """Encoded photographs in a fixed order per pass."""

    def __call__(self, turn):
        for number in np.random.default_rng(turn).permutation(10):
            file = io.BytesIO()
            paint(int(number)).save(file, "png")
            yield b"broken" if number == 4 else file.getvalue()


def test_a_stream_goes_on_anywhere_and_is_shared_by_processes():
    options = {"count": 10, "crops": cd.Crops((16, 16)), "seed": 1}
    whole = cd.StreamBatches(Stream(), batch_size=4, **options)
    numbers = iter(whole)
    batches = [next(numbers) for _ in range(6)]  # more than two passes
    assert all(b.images.shape == (4, 3, 16, 16) for b in batches)
    assert sum(len(b.skipped) for b in batches) == 2
    late = cd.StreamBatches(Stream(), batch_size=4, **options)
    late.start = 4
    assert torch.equal(next(iter(late)).images, batches[4].images)
    halves = [cd.StreamBatches(Stream(), batch_size=2, rank=r, world=2, **options) for r in range(2)]
    for number, (a, b) in enumerate(zip(*(iter(h) for h in halves), strict=True)):
        if batches[number].skipped:
            continue  # what replaces a broken photograph is the one before it, of the same process
        assert torch.equal(torch.cat([a.images, b.images]), batches[number].images)
        if number == 5:
            break


def test_rows_without_a_photograph_are_skipped():
    good = next(data for data in Stream()(0) if data != b"broken")
    cells = [None, {"bytes": None, "path": None}, {"bytes": None, "path": "/no/such.jpg"}]
    cells += [{"bytes": good, "path": None}] * 9
    source = cd.HubImages("rooms", [{"image": cell} for cell in cells], "image")
    batch = cd.PhotoBatches([source], cd.Crops((16, 16)), batch_size=12)[0]
    assert {name for name, _ in batch.skipped} == {"rooms 0", "rooms 1", "rooms 2"}


def test_data_sets_of_the_hub():
    assert cd.hub_source("imagenet-1k") == ("ILSVRC/imagenet-1k", "train")
    assert cd.hub_source("hf:a/b@test") == ("a/b", "test")
    assert cd.hub_source("photos") is None
    with pytest.raises(InvalidDataset, match="hub are streamed"):
        cd.first_of_stream("photos", 3)


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """``imagenet-1k`` with 10 photographs to train on, one of them broken, and 4 to validate on: the files of the hub's
    data set, in several shards, with its columns and its card."""
    datasets = pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet

    root, kind = tmp_path / "imagenet", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    (root / "data").mkdir(parents=True)
    whole = [data for data in Stream()(1) if data != b"broken"]
    for split, photographs, shards in (("train", list(Stream()(0)), 2), ("validation", whole[:4], 1)):
        for shard in range(shards):
            rows = [{"bytes": data, "path": f"n0_{i}.JPEG"} for i, data in enumerate(photographs[shard::shards])]
            columns = {"image": pyarrow.array(rows, kind), "label": pyarrow.array([i % 2 for i in range(len(rows))])}
            parquet.write_table(pyarrow.table(columns), root / f"data/{split}-{shard:05d}-of-{shards:05d}.parquet")
    (root / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
        "      class_label:\n        names:\n          '0': tench\n          '1': goldfish\n  splits:\n"
        "  - name: train\n    num_bytes: 1\n    num_examples: 10\n"
        "  - name: validation\n    num_bytes: 1\n    num_examples: 4\n---\n"
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(cd, "IMAGENET", str(root))
    return "imagenet-1k"


def test_imagenet_streamed_or_not(imagenet):
    crops = cd.Crops((16, 16))
    source, val = cd.open_photographs(imagenet), cd.open_photographs(f"{imagenet}@validation")
    assert (len(source), len(val)) == (10, 4)
    broken = [name for name, _ in cd.PhotoBatches([source], crops, batch_size=10)[0].skipped]
    assert len(broken) == 1
    assert source.read(int(broken[0].split()[-1])) == b"broken"
    assert len(cd.first_of_stream(imagenet, 3)) == 3
    stream = cd.open_stream(imagenet, crops, seed=0, batch_size=4)
    assert stream.per_pass == 2.5
    batches = [batch for batch, _ in zip(stream, range(4), strict=False)]
    stream.start = 3
    assert torch.equal(next(iter(stream)).images, batches[3].images)
    with pytest.raises(ModelUnavailable, match="test"):
        cd.open_photographs(f"{imagenet}@test")


@pytest.mark.parametrize("streaming", [True, False])
def test_training_on_imagenet_goes_on_after_an_interruption(imagenet, options, streaming, monkeypatch):
    """The whole run has a process that makes its batches."""
    changes = {"train": (imagenet,), "val": (f"{imagenet}@validation",), "streaming": streaming, "save_every": 2}
    whole = train(options, workers=1, **changes)
    assert whole["steps"] == 6
    assert len(whole["skipped"]) >= 1
    assert whole["best_val_psnr"] > 0
    step = CodecLoop._step

    def stop(self, *given):
        if self.step == 5:
            raise KeyboardInterrupt
        return step(self, *given)

    monkeypatch.setattr(CodecLoop, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(options, out=options["out"] + "2", **changes)
    monkeypatch.setattr(CodecLoop, "_step", step)
    assert train(options, out=options["out"] + "2", **changes)["best_val_psnr"] == whole["best_val_psnr"]
    one, two = losses_of(options["out"]), losses_of(options["out"] + "2")
    assert {n: row["loss"] for n, row in one.items()} == {n: row["loss"] for n, row in two.items()}


# The loop


def test_the_rate_is_monotone_after_the_warm_up_and_as_published():
    rates = [learning_rate(e / 10, peak=1.0, low=0.1, warmup=2, total=10) for e in range(111)]
    assert rates[0] == 0
    assert rates[20] == max(rates) == 1
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[100] == rates[110] == pytest.approx(0.1)
    golden = np.load(golden_path("utils.npz", "btnk_mae"))
    for name, recipe in (("lr_train", "published-train"), ("lr_finetune", "published-finetune")):
        config = load_codec_config(["out=x"], recipe=recipe)
        peak = config.peak_rate()
        for epoch, rate in golden[name]:
            found = learning_rate(epoch, peak=peak, low=config.min_lr, warmup=config.warmup_epochs, total=config.epochs)
            assert found == pytest.approx(rate, rel=1e-9, abs=1e-15)


def test_groups_have_their_own_rates_and_decay():
    codec = Codec.create(CodecConfig(32, 1, 4, 32, 1, 4, 8, (16, 16)))
    config = CodecTrainingConfig(out="x", train=("a",))
    groups = parameter_groups(codec, config)
    assert [(g["scale"], g["weight_decay"]) for g in groups] == [(0.1, 0.05), (0.1, 0), (1, 0.05), (1, 0)]
    assert all(p.ndim > 1 for g in groups if g["weight_decay"] for p in g["params"])
    free = {id(p) for g in groups if not g["weight_decay"] for p in g["params"]}
    assert {id(codec.encoder.cls_token), id(codec.decoder.learned_embed)} <= free
    published = parameter_groups(codec, CodecTrainingConfig(out="x", train=("a",), compat="published", encoder_lr=1.0))
    assert [(g["scale"], g["weight_decay"]) for g in published] == [(1, 0.05), (1, 0.05)]


def test_a_run_ends_in_a_model_that_loads(options):
    summary = train(options, tracker="tensorboard", name="mine", validate_every=0.6, samples=3)
    out = Path(options["out"])
    assert summary["steps"] == 6
    assert set(summary["skipped"]) <= {"broken.jpg", "cut.jpg"}
    rows = [json.loads(line) for line in (out / "training/log.jsonl").read_text().splitlines()]
    reached = [r["val_psnr"] for r in rows if "val_psnr" in r]
    assert len(reached) == 2
    assert all(-1 <= r["val_ssim"] <= 1 for r in rows if "val_ssim" in r)
    assert summary["best_val_psnr"] == max(reached)
    samples = sorted((out / "training/samples").iterdir())
    assert [s.name for s in samples] == ["step-0000003.png", "step-0000006.png"]
    picture = np.asarray(Image.open(samples[0]))
    assert picture.shape == (32, 48, 3)
    tiles = {picture[:16, 16 * i : 16 * i + 16].tobytes() for i in range(3)}
    assert len(tiles) == 3  # different photographs
    assert list((out / "training/tensorboard").iterdir())
    for folder in (out, out / "last"):
        codec = Codec.from_pretrained(f"dir:{folder}")
        assert (codec.name, codec.size, codec.card.trained_on) == ("mine", (16, 16), Path(options["train"][0]).name)
        assert codec.reconstruct(torch.rand(2, 3, 20, 30)).shape == (2, 3, 16, 16)


def test_training_learns_and_the_average_is_what_is_saved(options):
    summary = train(options, steps=150, validate_every=4.0, ema=0.9, crop=0.8, lr=3e-3)
    rows = list(losses_of(options["out"]).values())
    assert np.mean([r["loss"] for r in rows[-10:]]) < 0.6 * np.mean([r["loss"] for r in rows[:10]])
    state = load_pickle(Path(options["out"]) / "training/state.pt")
    saved = Codec.from_pretrained(f"dir:{options['out']}/last").state_dict()
    assert not torch.equal(saved["encoder.cls_token"], state["codec"]["encoder.cls_token"])
    assert any(torch.equal(saved["encoder.cls_token"], value) for value in state["average"])
    assert summary["best_val_psnr"] > 12


def test_a_killed_run_goes_on_as_if_nothing_had_happened(options, tmp_path):
    changes = {"save_every": 3, "accumulation": 2, "dropout": 0.3, "validate_every": 0.5}
    train(options, **changes)
    whole = losses_of(options["out"])
    broken = {**options, **changes, "out": str(tmp_path / "broken")}
    run_and_kill(RUN, "opsin.training.codec_loop.CodecLoop", broken)  # one step further than the saved state
    assert Codec.from_pretrained(f"dir:{tmp_path}/broken/last").dim == 32  # that of step 3 can be used already
    train_codec(CodecTrainingConfig(**broken))
    resumed = losses_of(broken["out"])
    assert list(resumed) == list(whole) == [1, 2, 3, 4, 5, 6]
    for step, row in whole.items():
        for key in ("loss", "bottleneck", "full", "lr", "grad_norm"):
            assert resumed[step][key] == row[key], (step, key)
    ends = [load_pickle(Path(o) / "training/state.pt") for o in (options["out"], broken["out"])]
    assert ends[0]["best"] == ends[1]["best"]
    for key in ends[0]["codec"]:
        assert torch.equal(ends[0]["codec"][key], ends[1]["codec"][key]), key
    for one, other in zip(ends[0]["average"], ends[1]["average"], strict=True):
        assert torch.equal(one, other)


def test_resuming_with_other_options_is_refused(options):
    train(options, steps=2)
    with pytest.raises(InvalidConfig, match="blr was"):
        train(options, steps=2, blr=0.5)
    assert train(options, steps=2)["steps"] == 2  # nothing left to do
    train(options, steps=1, blr=0.5, resume=False)
    assert list(losses_of(options["out"])) == [1]


def test_accumulation_equals_one_large_batch_and_drops_no_tail(options):
    changes = {"dropout": 0.0, "max_grad_norm": 0.0, "lr": 1e-3}
    train(options, batch_size=8, steps=3, out=options["out"] + "1", **changes)
    train(options, batch_size=2, accumulation=4, steps=3, out=options["out"] + "2", **changes)
    one, two = losses_of(options["out"] + "1"), losses_of(options["out"] + "2")
    for step in one:
        assert two[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-5)
        assert two[step]["grad_norm"] == pytest.approx(one[step]["grad_norm"], rel=1e-4)
    count = len(cd.hold_out([cd.open_photographs(options["train"][0])], 0.2)[0])
    summary = train(options, steps=None, epochs=2.0, batch_size=3, accumulation=2, out=options["out"] + "3")
    assert summary["steps"] == math.ceil(2 * count / 6)


def test_recomputed_activations_change_nothing(options):
    for name, again in (("1", False), ("2", True)):
        train(options, steps=2, dropout=0.2, checkpointing=again, out=options["out"] + name)
    one, two = losses_of(options["out"] + "1"), losses_of(options["out"] + "2")
    for step in one:
        assert two[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-6)
        assert two[step]["grad_norm"] == pytest.approx(one[step]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(options, dtype):
    train(options, steps=3, dtype=dtype)
    rows = losses_of(options["out"])
    assert all(math.isfinite(r["loss"]) for r in rows.values())
    train(options, steps=3, dtype="float32", out=options["out"] + "2")
    assert rows[1]["loss"] == pytest.approx(losses_of(options["out"] + "2")[1]["loss"], rel=0.02)


def test_fine_tuning_at_another_size_trains_from_what_was_learned(options):
    train(options, steps=60, ema=0.0)
    first = options["out"]
    train(options, steps=1, lr=1e-12, ema=0.0, init=f"dir:{first}/last", image_size=(16, 32), out=first + "2")
    wide = Codec.from_pretrained(f"dir:{first}2")
    assert wide.size == (16, 32)
    before, after = losses_of(first), losses_of(first + "2")
    assert after[1]["bottleneck"] < 0.85 * before[1]["bottleneck"]
    published = {"compat": "published", "encoder_lr": 1.0}
    train(options, steps=1, lr=1e-12, init=f"dir:{first}/last", image_size=(16, 32), out=first + "3", **published)
    assert losses_of(first + "3")[1]["bottleneck"] > after[1]["bottleneck"]  # its queries were drawn anew


def test_starting_as_components_of_patches(photos):
    images = cd.PhotoBatches([cd.open_photographs(str(photos))], cd.Crops((32, 32)), batch_size=64)[0].images
    images = (images + 0.1 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    codec = Codec.create(CodecConfig(128, 2, 16, 64, 2, 4, 8, (32, 32)))
    before = psnr(codec.reconstruct(images), images).mean()
    start_as_patches(codec, images)
    rows = patchify(codec.normalise(images), 8).flatten(0, 1)
    mean = rows.mean(0)
    basis = torch.linalg.eigh(torch.cov(rows.T))[1][:, -7:]
    best = ((rows - mean) @ basis @ basis.T + mean).reshape(len(images), 16, -1)
    bound = psnr(codec.denormalise(unpatchify(best, 8)), images).mean()
    found = psnr(codec.reconstruct(images), images).mean()
    assert before + 7 < found <= bound + 0.1
    right = CodecConfig(128, 2, 16, 64, 2, 4, 8, (32, 32))
    for wrong in (replace(right, heads=8), replace(right, activation="relu")):
        with pytest.raises(InvalidConfig, match="start=patches"):
            start_as_patches(Codec.create(wrong), images)


def test_a_run_that_starts_so(options):
    changes = {"start": "patches", "image_size": (32,), "patch_size": 16, "dim": 16, "holdout": 0.0, "lr": 1e-12}
    changes |= {"dropout": 0.0}
    train(options, steps=1, ema=0.0, out=options["out"] + "1", **changes)
    train(options, steps=1, ema=0.0, out=options["out"] + "2", **{**changes, "start": "published"})
    one, two = (losses_of(options["out"] + n)[1]["bottleneck"] for n in "12")
    assert one < 0.7 * two


def test_a_size_that_is_no_multiple_of_the_patch(options):
    with pytest.raises(UnsupportedSize, match="nearest size is 16×24"):
        train(options, image_size=(15, 23))


def test_no_validation_and_the_last_model(options):
    summary = train(options, steps=2, holdout=0.0)
    assert summary["best_val_psnr"] is None
    assert Codec.from_pretrained(f"dir:{options['out']}").dim == 32
    assert not (Path(options["out"]) / "last").exists()


def test_wandb_gets_numbers_and_pictures_in_the_wanted_mode(options, monkeypatch):
    import types

    sent, told = [], {}

    class Run:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def log(self, values, step):
            sent.append((step, values))

    def init(**given):
        told.update(given)
        return Run()

    module = types.SimpleNamespace(init=init, Image=lambda picture: ("image", picture.size))
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train(options, steps=2, tracker="wandb", project="rooms", samples=2)
    assert (told["mode"], told["project"]) == ("disabled", "rooms")
    assert any(values.get("samples") == ("image", (32, 32)) for _, values in sent)
    assert {"loss", "lr", "grad_norm"} <= set(sent[0][1])


def golden_codec(mode: str, dtype: torch.dtype) -> Codec:
    """The tiny codec of the golden numbers, with their filler."""
    codec = Codec.create(CodecConfig(96, 3, 4, 64, 2, 4, 16, (64, 64), dropout=0.0))
    for part in (codec.encoder, codec.decoder):
        for key, value in part.state_dict().items():
            if "pos_embed" in key:
                continue
            filled = draw(key, value.shape)
            if mode == "n002":
                filled = 0.02 * filled
            elif filled.ndim >= 2 and key.endswith("weight"):
                filled = filled * (1.0 / math.sqrt(filled.numel() / filled.shape[0]))
            else:
                filled = 0.2 * filled
            names = key.split(".")
            if names[-1] == "weight" and len(names) > 1 and "norm" in names[-2]:
                filled = filled + 1.0
            value.copy_(filled)
    return codec.to(dtype)


@pytest.mark.parametrize("mode", ["n002", "fan"])
def test_the_published_epochs(mode, tmp_path):
    """Three passes of six batches, two accumulated: losses and the end of the published engine."""
    from accelerate import Accelerator

    golden = np.load(golden_path(f"tiny_step_{mode}.npz", "btnk_mae"))
    codec = golden_codec(mode, torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (codec.card.mean, codec.card.std))

    class Batches(cd.PhotoBatches):
        per_pass = 6

        def __init__(self):
            pass

        def __getitem__(self, number):
            normalised = torch.from_numpy(golden_input(f"batch{number % 6}", (2, 3, 64, 64))).double()
            return cd.ImageBatch(normalised * std + mean)

    config = CodecTrainingConfig(
        out=str(tmp_path), train=("golden",), compat="published", encoder_lr=1.0, ema=0.0, max_grad_norm=0.0,
        epochs=10, warmup_epochs=2, lr=1e-3, min_lr=1e-5, accumulation=2, batch_size=2, dropout=0.0, device="cpu",
    )  # fmt: skip
    loop = CodecLoop(config, Accelerator(cpu=True), codec, Batches(), None, tmp_path, torch.float32)
    from opsin.training.codec_loop import Objective

    model, stream = Objective(codec, config, torch.float32), loop._stream()
    expected = golden["b_losses_f32"].reshape(9, 2, 2).mean(1)
    for step in range(9):
        found = loop._step(model, stream)
        loop.step += 1
        assert (found["bottleneck"], found["full"]) == pytest.approx(tuple(expected[step]), rel=3e-4)
    assert found["lr"] == pytest.approx(golden["b_lr_end_f32"][0], rel=1e-6)
    images = torch.from_numpy(golden_input("tiny", (2, 3, 64, 64))).double()
    with torch.no_grad():
        codec.eval()
        tokens = codec.encoder(images)
        assert np.abs(tokens.numpy() - golden["b_latent_after_f32"]).max() < 2e-2
        assert np.abs(codec.decoder(tokens[:, 0]).numpy() - golden["b_btnk_after_f32"]).max() < 2e-2


@pytest.mark.slow
def test_two_processes_hold_the_same_weights_and_equal_one_with_the_same_global_batch(options, tmp_path):
    options = {**options, "dropout": 0.0, "steps": 5, "accumulation": 2, "save_every": 5, "validate_every": 1.0}
    alone = {**options, "out": str(tmp_path / "alone"), "batch_size": 4, "lr": 1e-2}
    train_codec(load_codec_config(words(alone)))
    both = {**options, "out": str(tmp_path / "both"), "batch_size": 2, "lr": 1e-2}
    script = tmp_path / "run.py"
    script.write_text(
        "import os, torch, opsin.training.codec_loop as l; run = l.CodecLoop.run\n"
        "def kept(self):\n"
        "    found = run(self)\n"
        f"    torch.save(self.codec.state_dict(), f\"{tmp_path}/rank{{os.environ['RANK']}}.pt\")\n"
        "    return found\n"
        f"l.CodecLoop.run = kept\n{RUN}"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, str(script), *words(both)], check=True, env=environment(), timeout=120)
    ranks = [load_pickle(tmp_path / f"rank{r}.pt") for r in range(2)]
    single = load_pickle(tmp_path / "alone/training/state.pt")["codec"]
    for key, value in ranks[0].items():
        assert torch.equal(value, ranks[1][key]), key
        if key.endswith("attn.qkv.bias"):  # keys' biases have no gradient but noise, which Adam makes steps of
            width = len(value) // 3
            value, single[key] = (torch.cat([v[:width], v[2 * width :]]) for v in (value, single[key]))
        assert torch.allclose(value, single[key], atol=2e-4), key
    one, two = losses_of(alone["out"]), losses_of(both["out"])
    assert list(one) == list(two) == [1, 2, 3, 4, 5]
    for step in one:
        for key in ("loss", "bottleneck", "full", "grad_norm"):
            assert two[step][key] == pytest.approx(one[step][key], rel=2e-4), (step, key)
    scores = [load_pickle(Path(o) / "training/state.pt")["best"] for o in (alone["out"], both["out"])]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
