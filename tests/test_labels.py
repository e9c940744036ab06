"""Labels from what a person writes, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from opsin.errors import InvalidConfig, InvalidPrompt
from opsin.segmentation.labels import IMAGENET, PLAIN, Labels, as_labels


def test_text_list_and_mapping():
    expected = ("cat", "traffic light", "Sofa")
    for given in ("cat, traffic   light,Sofa", [" cat", "traffic light ", "Sofa"], (n for n in expected)):
        labels = as_labels(given)
        assert labels.classes == labels.texts == expected
        assert labels.phrases == (("cat",), ("traffic light",), ("Sofa",))
        assert labels.index.tolist() == [0, 1, 2]
        assert labels.templates == IMAGENET
        assert len(labels) == 3
    labels = as_labels({"person": ["man", "woman"], "sky": [], "road": "street"}, templates=None)
    assert labels.classes == ("person", "sky", "road")
    assert labels.texts == ("man", "woman", "sky", "street")
    assert labels.index.tolist() == [0, 0, 1, 2]
    assert labels.templates == PLAIN
    assert as_labels(labels) is labels
    with pytest.raises(dataclasses.FrozenInstanceError):
        labels.classes = ()


def test_templates():
    assert len(set(IMAGENET)) == 80
    assert as_labels("a", templates=["an {} here", "{}"]).templates == ("an {} here", "{}")
    with pytest.raises(InvalidConfig, match="where the label goes"):
        as_labels("a", templates=["a photo"])
    with pytest.raises(InvalidConfig, match="where the label goes"):
        as_labels("a", templates=[3])
    with pytest.raises(InvalidConfig, match="at least one template"):
        as_labels("a", templates=[])
    with pytest.raises(InvalidConfig, match='Did you mean "imagenet"'):
        as_labels("a", templates="imagnet")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("", "at least one label"),
        ("   ", "at least one label"),
        ([], "at least one label"),
        ({}, "at least one label"),
        ("cat,,dog", "letter or a digit"),
        (["cat", " "], "letter or a digit"),
        (["cat", "?!"], "letter or a digit"),
        ({"cat": ["kitten", ""]}, "letter or a digit"),
        (["Cat", "dog", " cat "], 'named once .* got "Cat" and "cat"'),
        (["stra\u00dfe", "STRASSE"], "named once"),
        (["caf\u00e9", "cafe\u0301"], "named once"),
        ({"person": ["man"], "worker": ["Man"]}, "each phrase|Each phrase"),
        ({"person": ["man", "man"]}, "Each phrase"),
        (["cat", 3], "A label is a text"),
        ([None], "A label is a text"),
        (3, "Labels are a text"),
        (None, "Labels are a text"),
        (b"cat", "Labels are a text"),
        ({"cat": 3}, "Labels are a text"),
    ],
)
def test_refused(labels, message):
    with pytest.raises(InvalidPrompt, match=message):
        as_labels(labels)


def test_refused_when_made_by_hand():
    with pytest.raises(InvalidPrompt, match="its phrases"):
        Labels(("a", "b"), (("a",),))
    with pytest.raises(InvalidPrompt, match="at least one phrase"):
        Labels(("a",), ((),))


def test_unicode_and_many():
    names = ["кошка", "猫", "🐱", "čtvrt", "قطة", *(f"label {i}" for i in range(1000))]
    labels = as_labels(names)
    assert labels.classes == tuple(names)
    assert as_labels("one").index.tolist() == [0]
