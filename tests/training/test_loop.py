"""Schedule, clipping, exact resume after a kill, accumulation, several processes, and that training learns."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opsin.errors import InvalidConfig, UnsupportedSize
from opsin.hub import load_pickle
from opsin.training import RegionTrainingConfig, load_config, train_regions
from opsin.training.loop import clip_factor, learning_rate, published_total
from tests.training.conftest import environment, losses_of, run_and_kill, words


def train(options, **changes):
    return train_regions(RegionTrainingConfig(**{**options, **changes}))


RUN = "import sys; from opsin.training import load_config, train_regions; train_regions(load_config(sys.argv[1:]))"


def test_the_rate_warms_up_and_falls_to_zero_at_the_true_end():
    rates = [learning_rate(s, peak=1e-3, warmup=100, total=1000) for s in range(1001)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[99] == max(rates) == pytest.approx(1e-3)
    assert rates[550] == pytest.approx(5e-4)
    assert rates[1000] == pytest.approx(0)
    assert rates[100:] == sorted(rates[100:], reverse=True)


def test_the_published_rate_oscillates():
    # COCO: 7393 batches of 16, 50 epochs; the cosine is laid over one sixteenth of the 369 650 steps.
    total = published_total(50, 7393, 16)
    assert total == 23103
    rate = [learning_rate(s, peak=1.0, warmup=100, total=total, published=True) for s in range(369650)]
    assert rate[0] == 0
    assert rate[total] == pytest.approx(0, abs=1e-6)
    assert rate[2 * total - 100] == pytest.approx(1, abs=1e-6)
    lows = sum(1 for a, b, c in zip(rate, rate[1:], rate[2:], strict=False) if b < a and b <= c)
    assert lows == 8


def test_clipping():
    assert clip_factor(10, 5, 0) == pytest.approx(0.5)
    assert clip_factor(1, 5, 0) == 1
    assert clip_factor(10, 0, 0) == 1
    assert clip_factor(1, 5, 0, published=True) == pytest.approx(5 / 2**16)
    assert clip_factor(1, 5, 2000, published=True) == pytest.approx(5 / 2**17)
    assert clip_factor(1, 5, 2000 * 54, published=True) == 0  # at 2^70 the scaled norm overflows


def test_a_run_ends_in_a_model_that_loads(options, bsds):
    from opsin.regions import RegionModel

    val = (f"bsds:{bsds}@val",)
    summary = train(options, val=val, validate_every=3, embed_backbone=True, tracker="tensorboard", name="mine")
    out = Path(options["out"])
    assert summary["steps"] == 6
    assert summary["skipped"] == {}
    rows = [json.loads(line) for line in (out / "training/log.jsonl").read_text().splitlines()]
    held_out = [r["val_loss"] for r in rows if "val_loss" in r]
    assert len(held_out) == 2
    assert summary["best_val_loss"] == min(held_out)
    assert list((out / "training/tensorboard").iterdir())
    shutil.move(out, out.with_name("moved"))  # it stands alone
    model = RegionModel.from_pretrained(f"dir:{out.with_name('moved')}")
    assert (model.name, model.dim, model.card.image_size) == ("mine", 32, 64)
    image = torch.rand(3, 40, 60)
    assert model.encode(image, points=[[5.0, 6.0], [30.0, 20.0]]).tokens.shape == (2, 32)


def test_the_model_of_the_best_validation_is_kept(options, bsds):
    from safetensors.torch import load_file

    changes = {"val": (f"bsds:{bsds}@val",), "validate_every": 1, "lr": 3.0, "warmup_steps": 0}
    train(options, **changes)  # a rate at which things only get worse
    out = Path(options["out"])
    rows = [json.loads(line) for line in (out / "training/log.jsonl").read_text().splitlines()]
    held_out = [r["val_loss"] for r in rows if "val_loss" in r]
    state = load_pickle(out / "training/state.pt")
    key = "prompt_proj.weight"
    same = torch.equal(load_file(out / "regions.safetensors")[key], state["encoder"][key])
    assert same == (held_out[-1] == min(held_out))
    assert state["best"] == min(held_out)


def test_validation_is_without_dropout_and_repeats(options, bsds):
    changes = {"val": (f"bsds:{bsds}@val",), "validate_every": 1, "lr": 1e-30, "weight_decay": 0.0, "dropout": 0.5}
    train(options, steps=2, **changes)
    rows = map(json.loads, (Path(options["out"]) / "training/log.jsonl").read_text().splitlines())
    first, second = (r["val_loss"] for r in rows if "val_loss" in r)
    assert first == second


def test_a_killed_run_goes_on_as_if_nothing_had_happened(options, tmp_path):
    train(options, save_every=3)
    whole = losses_of(options["out"])
    broken = {**options, "out": str(tmp_path / "broken"), "save_every": 3}
    run_and_kill(RUN, "opsin.training.loop.Loop", broken)  # one step further than the saved state
    assert (tmp_path / "broken/regions.safetensors").exists()  # the model of step 3 can be used already
    train(broken)
    resumed = losses_of(broken["out"])
    assert list(resumed) == list(whole) == [1, 2, 3, 4, 5, 6]
    for step, row in whole.items():
        for key in ("loss", "contrastive", "feature", "lr", "grad_norm"):
            assert resumed[step][key] == row[key], (step, key)


def test_resuming_with_other_options_is_refused(options):
    train(options, steps=2)
    with pytest.raises(InvalidConfig, match="lr was"):
        train(options, steps=2, lr=0.5)
    assert train(options, steps=2)["steps"] == 2  # nothing left to do
    train(options, steps=1, lr=0.5, resume=False)
    assert list(losses_of(options["out"])) == [1]


def test_a_state_from_before_options_had_their_name_goes_on(options):
    train(options, steps=2)
    path = Path(options["out"]) / "training/state.pt"
    state = load_pickle(path)
    state["config"] = state.pop("options")
    path.unlink()  # its tensors are read from the file when they are needed
    torch.save(state, path)
    assert train(options, steps=2)["steps"] == 2
    with pytest.raises(InvalidConfig, match="lr was"):
        train(options, steps=2, lr=0.5)


def test_accumulation_averages_micro_steps(options):
    changes = {"dropout": 0.0, "lr": 1e-30, "warmup_steps": 0}
    train(options, steps=2, out=options["out"] + "1", **changes)
    train(options, steps=1, accumulation=2, out=options["out"] + "2", **changes)
    one, two = losses_of(options["out"] + "1"), losses_of(options["out"] + "2")
    assert two[1]["loss"] == pytest.approx((one[1]["loss"] + one[2]["loss"]) / 2, rel=1e-6)
    assert two[1]["grad_norm"] <= max(one[1]["grad_norm"], one[2]["grad_norm"])


def test_training_learns_a_toy_problem(options, classes_zip):
    train(options, train=(*options["train"], f"mosaic:{classes_zip}@train"), steps=60, lr=3e-3, semantic_weight=1.0,
          pred_feature_weight=0.5, dropout=0.0, rotation=10.0)
    rows = list(losses_of(options["out"]).values())
    for key in ("loss", "feature", "pred_feature", "semantic"):
        early, late = (sum(r[key] for r in part) / 10 for part in (rows[:10], rows[-10:]))
        assert late < early, key
    assert late < 0.9 * early


def test_bfloat16_and_the_published_recipe_run(options):
    train(options, steps=2, dtype="bfloat16", compat="published")
    assert all(math.isfinite(r["loss"]) for r in losses_of(options["out"]).values())
    assert losses_of(options["out"])[1]["lr"] == 0


def test_starting_from_another_encoder(options):
    train(options, steps=3)
    first = options["out"]
    train(options, steps=1, lr=1e-30, init=f"dir:{first}", out=first + "2")
    assert torch.allclose(
        load_pickle(Path(first + "2") / "training/state.pt")["encoder"]["prompt_proj.weight"],
        load_pickle(Path(first) / "training/state.pt")["encoder"]["prompt_proj.weight"],
    )


def test_a_size_that_is_no_multiple_of_the_patch(options):
    with pytest.raises(UnsupportedSize, match="nearest is 64"):
        train(options, image_size=63)


@pytest.mark.slow
def test_two_processes_equal_one_with_the_same_global_batch(options, tmp_path):
    options = {**options, "dropout": 0.0, "steps": 4, "semantic_weight": 1.0, "save_every": 2}
    alone = {**options, "out": str(tmp_path / "alone"), "batch_size": 8}
    train_regions(load_config(words(alone)))
    both = {**options, "out": str(tmp_path / "both"), "batch_size": 4}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = tmp_path / "run.py"
    script.write_text(RUN)
    subprocess.run([*launch, str(script), *words(both)], check=True, env=environment(), timeout=120)
    one, two = losses_of(alone["out"]), losses_of(both["out"])
    assert list(one) == list(two)
    for step in one:
        for key in ("loss", "contrastive", "feature", "semantic", "grad_norm"):
            assert two[step][key] == pytest.approx(one[step][key], rel=2e-4), (step, key)
