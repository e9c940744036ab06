"""The filler of golden weights draws what it drew when the golden numbers were made."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.conftest import golden_path
from tests.parity.filler import radseg_keys, radseg_weights


@pytest.mark.parametrize("name", ["tiny:fan3", "vitb:fan2", "vitb:flat"])
def test_filler(name):
    model, mode = name.split(":")
    facts = json.loads(golden_path("filler_check.json", "radseg").read_text())[name]
    keys = radseg_keys(model)
    for key, fact in facts.items():
        value = radseg_weights({key: keys[key]}, mode)[key]
        np.testing.assert_allclose(value.reshape(-1)[:8], fact["first8"], atol=1e-6)
        assert value.sum(dtype=np.float64) == pytest.approx(fact["sum"], abs=1e-2)
