"""Largest component and box of a mask in the published visual query pipeline."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.conftest import golden_path
from tests.parity import adapters_tracking as adapters


@pytest.fixture(scope="module")
def masks() -> dict[str, Any]:
    with np.load(golden_path("vq_masks.npz")) as file:
        return {name: file[name] for name in file.files} | {"meta": json.loads(str(file["meta"]))}


def test_largest_component(masks: dict[str, Any]) -> None:
    names = [name.removesuffix("_mask") for name in masks if name.endswith("_mask")]
    assert len(names) == 13
    for name in names:
        got = adapters.vq_largest_component(masks[f"{name}_mask"])
        assert got.dtype == bool
        np.testing.assert_array_equal(got, masks[f"{name}_largest"] > 0, err_msg=name)


def test_boxes(masks: dict[str, Any]) -> None:
    for case in masks["meta"]["boxes"]:
        mask = masks[f"{case['mask']}_mask"]
        if isinstance(case["bbox"], dict):
            assert case["bbox"]["error"] == "ValueError"
            with pytest.raises(ValueError, match="empty mask"):
                adapters.vq_mask_box(mask)
        else:
            assert adapters.vq_mask_box(mask) == case["bbox"], case["mask"]
