"""Options: overrides, files, and what wrong ones get, all before a weight is read."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields

import pytest

from opsin.cli import train as command
from opsin.errors import InvalidConfig, MissingFile
from opsin.training import CodecTrainingConfig, RegionTrainingConfig, load_config, train_regions

NEEDED = ["backbone=b", "out=o", "train=[bsds:/data,mosaic:z.zip@train]"]


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("backbone: b\nout: o\ntrain: [bsds:/data]\nlr: 0.5\nsteps: 7\n")
    config = load_config(["lr=1e-4", "weights=[2]"], file)
    assert (config.lr, config.steps, config.train, config.weights) == (1e-4, 7, ("bsds:/data",), (2.0,))
    assert load_config([*NEEDED[:2], "train=bsds:/x y"]).train == ("bsds:/x y",)
    assert load_config([f"{k}={json.dumps(v)}" for k, v in config.to_dict().items()]) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["learning_rat=1"], "known names"),
        (["warmup=3"], 'Did you mean "warmup_steps"'),
        (["lr=fast"], "lr is of type float"),
        (["steps=1.5"], "steps is of type int"),
        (["lr=0"], "lr is positive"),
        (["epochs=inf"], "epochs is positive"),
        (["lr"], "key=value"),
        (["+lr=1"], "key=value"),
        (["lr=1,2"], "sweeps"),
        (["train=bsd:/data"], 'Did you mean "bsds"'),
        (["train=coco:a.json"], "images_folder"),
        (["weights=[1]"], "each of the 2 sources"),
        (["dropout=2"], r"\[0, 1\]"),
        (["dtype=float8"], "bfloat16"),
        (["compat=publish"], "published"),
        (["mosaic_tiles=[9,3]"], "mosaic_tiles"),
        (["batch_size=0"], "at least 1"),
        (["out=''"], '"out" must be given'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InvalidConfig, match=message):
        load_config([*NEEDED, *options])


def test_wrong_files(tmp_path):
    with pytest.raises(MissingFile):
        load_config(NEEDED, tmp_path / "none.yaml")
    for content in ("a: [", "- 1\n", "lrr: 3\n"):
        (tmp_path / "c.yaml").write_text(content)
        with pytest.raises(InvalidConfig):
            load_config(NEEDED, tmp_path / "c.yaml")


def test_one_value_is_enough_where_several_may_be_given(tmp_path):
    for train in ("bsds:/data", ["bsds:/data"], ("bsds:/data",)):
        assert RegionTrainingConfig(backbone="b", out="o", train=train).train == ("bsds:/data",)
    config = CodecTrainingConfig(out="o", train="photos", image_size=64)
    assert (config.train, config.canvas) == (("photos",), (64, 64))


def test_missing_data_is_found_before_the_backbone(tmp_path):
    config = RegionTrainingConfig(backbone="no-such", out=str(tmp_path / "o"), train=("bsds:/nowhere",), device="cpu")
    with pytest.raises(MissingFile, match="/nowhere"):
        train_regions(config)


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_help_lists_every_key_and_the_example_is_valid(capsys):
    with pytest.raises(SystemExit):
        parse("regions", "--help")
    text = capsys.readouterr().out
    keys = [line.split("=")[0].strip() for line in text.split("\noptions:\n")[-1].splitlines()]
    assert sorted(keys) == sorted(f.name for f in fields(RegionTrainingConfig))
    assert keys[:3] == ["backbone", "train", "out"]
    example = command.REGION_EXAMPLE.split("opsin train regions ", 1)[1].split("\n\n")[0]
    lines = example.replace("\\\n", " ").replace("'", "")
    assert command.run(parse("regions", *lines.split(), "--check")) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 20000
