"""Templates, canonicalisation, normalisation and mean, against the published code with a toy tower."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from opsin.backbones.text import canonicalize
from opsin.segmentation.labels import IMAGENET
from tests.conftest import golden_path
from tests.parity.adapters_text import radseg_text


@pytest.fixture(scope="module")
def toy() -> dict:
    with np.load(golden_path("tiny_text_toy.npz", "radseg")) as file:
        return {**file, "meta": json.loads(str(file["meta"]))}


def token_ids(texts: Sequence[str]) -> np.ndarray:
    """The ids of words by checksum, 0 after the last of up to 64."""
    rows = np.zeros((len(texts), 64), np.int32)
    for row, text in zip(rows, texts, strict=True):
        ids = [1 + zlib.crc32(word.encode()) % 997 for word in text.split()]
        row[: len(ids)] = ids
    return rows


def tower(table: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    return np.stack([table[ids[ids > 0]].mean(0) for ids in token_ids(texts)])


def test_the_templates_are_the_published_ones(toy: dict):
    assert [zlib.crc32(t.replace("{}", "X").encode()) for t in IMAGENET] == toy["meta"]["template_crc32"]


def test_canonical_texts(toy: dict):
    texts = [canonicalize(template.replace("{}", "traffic light")) for template in IMAGENET]
    np.testing.assert_array_equal(token_ids(texts), toy["traffic_light_ids"])


def test_the_table(toy: dict):
    generator = torch.Generator().manual_seed(zlib.crc32(b"toy_text.embedding"))
    np.testing.assert_allclose(torch.randn(998, 72, generator=generator).numpy(), toy["toy_table"], atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_labels_and_prompts(toy: dict, dtype: type):
    table = toy["toy_table"].astype(dtype)
    for name, texts, templates in (
        ("label_embeds", toy["meta"]["labels"], "imagenet"),
        ("prompt_embeds", toy["meta"]["prompts"], None),
    ):
        rows = radseg_text(lambda batch: tower(table, batch), texts, dim=72, templates=templates)
        assert rows.dtype == dtype
        np.testing.assert_allclose(rows, toy[name], rtol=0, atol=3e-7)
        if templates:
            norms = np.linalg.norm(rows, axis=1)
            np.testing.assert_allclose(norms, toy["label_norms"], rtol=1e-6)
            assert norms.max() < 0.99, "means are not made unit vectors again"
