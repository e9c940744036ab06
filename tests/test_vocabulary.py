"""The cache of label embeddings: what is encoded, what is read back, and by whom."""

from __future__ import annotations

import multiprocessing
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from opsin import hub
from opsin.errors import IncompatibleModel, InvalidCheckpoint
from opsin.segmentation import vocabulary as module
from opsin.segmentation.labels import as_labels
from opsin.segmentation.vocabulary import Vocabulary, of_text, reduce_synonyms

DIM = 6


class Tower:
    """Draws a vector per text; remembers what it was asked."""

    def __init__(self, dim: int = DIM, dtype: torch.dtype = torch.float32) -> None:
        self.dim, self.dtype, self.asked = dim, dtype, []

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
        self.asked.append(list(texts))
        return torch.stack([draw(text, self.dim) for text in texts]).to(self.dtype)


def draw(text: str, dim: int = DIM) -> Tensor:
    return torch.randn(dim, generator=torch.Generator().manual_seed(zlib.crc32(text.encode()))) * 3


def mean(phrase: str, templates: Sequence[str]) -> Tensor:
    rows = [draw(template.replace("{}", phrase)) for template in templates]
    return torch.stack([row / row.norm() for row in rows]).mean(0)


def never() -> Tower:
    raise RuntimeError("the tower is not needed")


def test_rows_are_means_of_unit_vectors():
    labels = as_labels({"person": ["man", "woman"], "sky": []})
    rows = Vocabulary(Tower, "m", DIM).embed(labels)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, torch.stack([mean(t, labels.templates) for t in ("man", "woman", "sky")]))
    rows = Vocabulary(lambda: Tower(dtype=torch.bfloat16), "m", DIM).embed(labels)
    assert rows.dtype == torch.float32
    rows = Vocabulary(lambda: Tower(dtype=torch.float64), "m", DIM).embed(labels)
    assert rows.dtype == torch.float64


def test_a_cached_question_needs_no_tower(tmp_path: Path):
    tower = Tower()
    first = Vocabulary(lambda: tower, "m", DIM, tmp_path)
    rows = first.embed(as_labels("cat, dog"))
    assert sum(map(len, tower.asked)) == 160
    assert torch.equal(first.embed(as_labels("dog, cat")), rows.flip(0))
    assert len(first.embed(as_labels("dog, cow"))) == 2
    assert sum(map(len, tower.asked)) == 240, "only what is missing is encoded"
    second = Vocabulary(never, "m", DIM, tmp_path)
    assert torch.equal(second.embed(as_labels("dog, cat")), rows.flip(0))
    with pytest.raises(RuntimeError, match="not needed"):
        second.embed(as_labels("dog, horse"))


@pytest.mark.parametrize(
    "other",
    [
        lambda folder: (Vocabulary(never, "m@2", DIM, folder), as_labels("cat")),
        lambda folder: (Vocabulary(never, "m", DIM, folder), as_labels("cat", templates=None)),
        lambda folder: (Vocabulary(never, "m", DIM, folder), as_labels("cat", templates=["one {}"])),
        lambda folder: (Vocabulary(never, "m", DIM, folder), as_labels("Cat")),
        lambda folder: (Vocabulary(never, "m", DIM, folder, canonical=True), as_labels("cat")),
        lambda folder: (Vocabulary(never, "m", DIM + 1, folder), as_labels("cat")),
        lambda folder: (Vocabulary(never, "m", DIM, None), as_labels("cat")),
    ],
)
def test_other_questions_are_not_confused(other: Callable, tmp_path: Path):
    Vocabulary(Tower, "m", DIM, tmp_path).embed(as_labels("cat"))
    vocabulary, labels = other(tmp_path)
    with pytest.raises(RuntimeError, match="not needed"):
        vocabulary.embed(labels)


def test_canonical_texts_share_a_row(tmp_path: Path):
    tower = Tower()
    vocabulary = Vocabulary(lambda: tower, "m", DIM, tmp_path, canonical=True)
    rows = vocabulary.embed(as_labels(["traffic-light", "TrafficLight!"]))
    assert torch.equal(rows[0], rows[1])
    assert sum(map(len, tower.asked)) == 80
    assert "a bad photo of a trafficlight" in tower.asked[0]
    other = Vocabulary(never, "m", DIM, tmp_path, canonical=True)
    assert torch.equal(other.embed(as_labels("trafficlight")), rows[:1])


def test_large_batches_and_what_an_interruption_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CHUNK", 4)

    class Tired(Tower):
        def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().encode(texts)

    tower = Tired()
    labels = as_labels([f"label {i}" for i in range(10)], templates=["a {}", "the {}"])
    with pytest.raises(KeyboardInterrupt):
        Vocabulary(lambda: tower, "m", DIM, tmp_path).embed(labels)
    assert [len(texts) for texts in tower.asked] == [4, 4]
    again = Tower()
    rows = Vocabulary(lambda: again, "m", DIM, tmp_path).embed(labels)
    assert [len(texts) for texts in again.asked] == [4, 4, 4], "the first four labels are there already"
    torch.testing.assert_close(rows, torch.stack([mean(text, labels.templates) for text in labels.texts]))
    monkeypatch.setattr(module, "CHUNK", 256)
    whole = Tower()
    torch.testing.assert_close(Vocabulary(lambda: whole, "m", DIM).embed(labels), rows)
    assert [len(texts) for texts in whole.asked] == [20], "all labels go together"


def test_damaged_files_are_made_anew(tmp_path: Path):
    rows = Vocabulary(Tower, "m", DIM, tmp_path).embed(as_labels("cat, dog"))
    first, second = sorted(tmp_path.rglob("*.safetensors"))
    first.write_bytes(b"")
    hub.save_safetensors({"embedding": torch.zeros(DIM + 2)}, second)
    assert torch.equal(Vocabulary(Tower, "m", DIM, tmp_path).embed(as_labels("cat, dog")), rows)
    assert torch.equal(Vocabulary(never, "m", DIM, tmp_path).embed(as_labels("cat, dog")), rows)


def test_a_cache_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "text").write_text("a file is in the way")
    vocabulary = Vocabulary(Tower, "m", DIM, tmp_path)
    with pytest.warns(UserWarning, match="cannot be kept"):
        rows = vocabulary.embed(as_labels("cat, dog"))
    assert rows.shape == (2, DIM)
    assert torch.equal(vocabulary.embed(as_labels("cat")), rows[:1])


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*given: object):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(hub, "save_safetensors", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert Vocabulary(Tower, "m", DIM, tmp_path).embed(as_labels("cat, dog")).shape == (2, DIM)


def test_wrong_towers():
    with pytest.raises(IncompatibleModel, match="width 6; got 5"):
        Vocabulary(lambda: Tower(5), "m", DIM).embed(as_labels("cat"))

    class Broken(Tower):
        def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
            return super().encode(texts) / 0

    with pytest.raises(InvalidCheckpoint, match="finite"):
        Vocabulary(Broken, "m", DIM).embed(as_labels("cat"))


def test_the_tower_is_kept_and_released(monkeypatch: pytest.MonkeyPatch):
    made = []
    vocabulary = Vocabulary(lambda: made.append(Tower()) or made[-1], "m", DIM)
    vocabulary.embed(as_labels("cat"))
    vocabulary.embed(as_labels("dog"))
    assert len(made) == 1
    vocabulary.release()
    monkeypatch.setattr(module, "_KEPT", 0)  # memory is bounded, too
    rows = vocabulary.embed(as_labels("dog"))
    torch.testing.assert_close(rows[0], mean("dog", as_labels("dog").templates))
    assert len(made) == 2
    assert "canonical=False" in repr(vocabulary)


def ask(folder: Path, names: list[str]) -> None:
    Vocabulary(Tower, "m", DIM, folder).embed(as_labels(names))


@pytest.mark.slow
def test_several_processes_at_once(tmp_path: Path):
    names = [f"label {i}" for i in range(40)]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=ask, args=(tmp_path, names[::step])) for step in (1, -1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    rows = Vocabulary(never, "m", DIM, tmp_path).embed(as_labels(names))
    torch.testing.assert_close(rows[7], mean(names[7], as_labels("x").templates))
    assert not list(tmp_path.rglob(".*")), "no temporary file is left"


def test_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a real, tiny tower; the second vocabulary reads from the disk."""
    from opsin.errors import ModelUnavailable
    from tests.conformance.test_text import full_model, save_tokenizer

    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    full_model("siglip2").save_pretrained(folder)
    save_tokenizer(folder)
    labels = as_labels("red cat, dog")
    rows = of_text(folder, 16, canonical=True).embed(labels)
    assert rows.shape == (2, 16)
    assert rows.norm(dim=-1).max() <= 1
    monkeypatch.setattr(module, "load_text", lambda *args, **options: never())
    assert torch.equal(of_text(f"dir:{folder}", 16, canonical=True).embed(labels), rows)
    with pytest.raises(RuntimeError, match="not needed"):
        of_text(folder, 16, canonical=True, dtype="bfloat16").embed(labels)
    with pytest.raises(ModelUnavailable, match="hf download"):
        of_text("hf:google/siglip2-so400m-patch16-naflex", 1152)


def test_synonyms():
    labels = as_labels({"person": ["man", "woman", "child"], "sky": [], "road": ["street", "lane"]})
    scores = torch.randn(6, 4, 5)
    reduced = reduce_synonyms(scores, labels.index, 3)
    torch.testing.assert_close(reduced, torch.stack([scores[:3].amax(0), scores[3], scores[4:].amax(0)]))
    assert reduce_synonyms(scores[:3], as_labels("a, b, c").index, 3).data_ptr() == scores.data_ptr()
    assert reduce_synonyms(scores, as_labels({"x": list("abcdef")}).index, 1).shape == (1, 4, 5)
