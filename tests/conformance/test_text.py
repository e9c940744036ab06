"""Text towers of every family, tiny and random, against the full models of images and text that they come from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from opsin.backbones.text import TextEncoder, canonicalize, load_text, text_name
from opsin.errors import (
    IncompatibleModel,
    InvalidCheckpoint,
    InvalidConfig,
    InvalidPrompt,
    MissingExtra,
    MissingFile,
    ModelUnavailable,
    UnknownModel,
)

WORDS = ["a", "photo", "of", "the", "red", "traffic", "light", "trafficlight", "cat", "dog", "in", ".", ",", "Cat"]
TEXTS = ["a photo of the red cat.", "dog", "A red photo of a traffic-light, in the dog", "", "kitten " * 100]
TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 40, "max_position_embeddings": 12, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILIES = ("siglip", "siglip2", "siglip-giant", "clip", "tipsv2")


def full_model(family: str) -> Any:
    """The model of images and text, tiny; its random weights are large enough to tell one text from another."""
    import transformers as hf

    picture = {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    if family == "clip":
        config = hf.CLIPConfig(
            text_config={**TEXT, "projection_dim": 10}, vision_config=VISION | picture, projection_dim=10
        )
    elif family == "tipsv2":
        vision = {key: value for key, value in VISION.items() if key != "intermediate_size"}
        config = hf.AutoConfig.for_model("tipsv2", text_config=TEXT, vision_config=vision | picture)
    elif family == "siglip2":
        config = hf.Siglip2Config(text_config=TEXT, vision_config=VISION | {"patch_size": 8, "num_patches": 16})
    else:  # that of the giant projects to another width
        width = {"projection_size": 20} if family == "siglip-giant" else {}
        config = hf.SiglipConfig(text_config=TEXT | width, vision_config=VISION | picture)
    model = hf.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def save_tokenizer(folder: Path, *, lower: bool = False, ends: bool = True, **settings: Any) -> None:
    """One word per token; ``<eos>`` at the end."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"pad_token": "<pad>", "eos_token": {"content": "<eos>"}, "unk_token": "<unk>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


def ids_of(texts: list[str], *, lower: bool, length: int | None) -> tuple[Tensor, Tensor]:
    """An own tokeniser of such files, to compare with."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *WORDS]
    split = pre_tokenizers.Whitespace()
    rows = []
    for text in texts:
        words = [word for word, _ in split.pre_tokenize_str(text.lower() if lower else text)]
        rows.append([names.index(word) if word in names else 3 for word in words[:11]] + [1])
    longest = length or max(len(row) for row in rows)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows]), mask


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Each family in a folder of its own, and the full model."""
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        model = full_model(family)
        model.save_pretrained(folder)
        save_tokenizer(folder, lower=family in ("clip", "tipsv2"))  # these files say so themselves
        made[family] = (folder, model)
    return made


def expected(family: str, model: Any, texts: list[str]) -> Tensor:
    filled = family.startswith("siglip")
    ids, mask = ids_of(texts, lower=True, length=12 if filled else None)
    with torch.no_grad():
        output = model.get_text_features(input_ids=ids, attention_mask=None if filled else mask)
    return output.pooler_output


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_full_model(family: str, saved: dict[str, tuple[Path, Any]]):
    folder, model = saved[family]
    encoder = load_text(f"dir:{folder}")
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), encoder.dim)
    assert encoder.dim == {"siglip-giant": 20, "clip": 10}.get(family, 16)
    assert encoder.max_length == 12
    torch.testing.assert_close(vectors, expected(family, model, TEXTS), rtol=1e-5, atol=1e-5)
    if family in ("siglip", "siglip2"):  # what RADIO's adaptors read
        ids, _ = ids_of(TEXTS, lower=True, length=12)
        torch.testing.assert_close(vectors, model.text_model(ids).pooler_output, rtol=1e-5, atol=1e-5)
    assert (vectors[0] - vectors[1]).abs().max() > 0.05, "texts must differ for this test to tell anything"
    names = {name.removeprefix("text_model.") for name, _ in encoder.model.named_parameters()}
    owned = {name.removeprefix("text_model.") for name, _ in model.named_parameters() if name.startswith("text_")}
    assert names == owned, "the text half and no more"
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.train().model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_equals_singles(family: str, saved: dict[str, tuple[Path, Any]]):
    encoder = load_text(saved[family][0])
    vectors = encoder.encode(TEXTS)
    for batch_size in (1, 2):
        torch.testing.assert_close(encoder.encode(TEXTS, batch_size=batch_size), vectors, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder.encode(TEXTS[1:2])[0], vectors[1], rtol=1e-5, atol=1e-5)
    assert encoder.encode([]).shape == (0, encoder.dim)
    assert torch.equal(encoder.encode(TEXTS), vectors)


@pytest.mark.parametrize("family", FAMILIES)
def test_dtypes(family: str, saved: dict[str, tuple[Path, Any]]):
    folder, model = saved[family]
    exact = load_text(folder, dtype="float64").encode(TEXTS)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, expected(family, model.double(), TEXTS), rtol=1e-6, atol=1e-6)
    model.float()
    rough = load_text(folder, dtype="bfloat16").encode(TEXTS)
    assert rough.dtype == torch.bfloat16
    assert torch.cosine_similarity(rough.double(), exact).min() > 0.99
    if family != "tipsv2":  # its mask is looked at
        assert load_text(folder, device="meta").encode(["cat"]).device.type == "meta"


@pytest.mark.parametrize("family", FAMILIES)
def test_only_shards_with_text_are_opened(family: str, saved: dict[str, tuple[Path, Any]], tmp_path: Path):
    folder = saved[family][0]
    state = load_file(folder / "model.safetensors")
    text = {key: value for key, value in state.items() if key.startswith("text")}
    halves = list(text)[::2], list(text)[1::2]
    for i, names in enumerate(halves):
        save_file({name: text[name] for name in names}, tmp_path / f"model-{i}.safetensors")
    (tmp_path / "model-2.safetensors").write_bytes(b"damaged")
    table = {name: f"model-{i}.safetensors" for i, names in enumerate(halves) for name in names}
    table |= {name: "model-2.safetensors" for name in state if name not in text}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    torch.testing.assert_close(load_text(tmp_path).encode(TEXTS), load_text(folder).encode(TEXTS))
    (tmp_path / "model-1.safetensors").write_bytes(b"damaged")
    with pytest.raises(InvalidCheckpoint, match="whole"):
        load_text(tmp_path)


@pytest.mark.parametrize("family", ["siglip2", "clip", "tipsv2"])
def test_a_text_tower_saved_alone(family: str, saved: dict[str, tuple[Path, Any]], tmp_path: Path):
    folder = saved[family][0]
    encoder = load_text(folder)
    encoder.model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    torch.testing.assert_close(load_text(tmp_path).encode(TEXTS), encoder.encode(TEXTS))


def test_how_texts_are_prepared(saved: dict[str, tuple[Path, Any]], tmp_path: Path):
    for text, result in {
        "A Traffic-Light!": "a trafficlight", "Grey_Jacket": "grey jacket", "  x \t y\n": "x y", "?": "",
        "itap of a {}.": "itap of a", "Straße, Čaj": "straße čaj", "猫。": "猫。",
    }.items():  # fmt: skip
        assert canonicalize(text) == result
    folder, model = saved["siglip2"]
    plain, canonical = load_text(folder), load_text(folder, canonical=True)
    assert plain.prepare("A Traffic-Light.") == "a traffic-light."
    assert canonical.prepare("A Traffic-Light.") == "a trafficlight"
    assert torch.equal(canonical.encode(["The RED traffic-light!"]), canonical.encode(["the red trafficlight"]))
    torch.testing.assert_close(
        canonical.encode(["The RED traffic-light!"]), expected("siglip2", model, ["the red trafficlight"])
    )
    assert not torch.equal(plain.encode(["traffic-light"]), plain.encode(["trafficlight"]))
    assert load_text(saved["clip"][0]).prepare("A Traffic-Light.") == "a traffic-light."
    ids, mask = load_text(saved["tipsv2"][0]).tokenize(["cat", "a photo of the cat"])
    assert ids.shape == mask.shape == (2, 6)
    assert mask.tolist() == [[1, 1, 0, 0, 0, 0], [1] * 6]
    ids, _ = plain.tokenize(["Cat"])
    assert ids.tolist() == [[WORDS.index("cat") + 4, 1] + [0] * 10]
    # the first SigLIP's tokeniser also drops punctuation; the underscore with it
    first = link(saved["siglip"][0], tmp_path / "first")
    save_tokenizer(first, tokenizer_class="SiglipTokenizer")
    assert load_text(first).prepare("A Traffic_light, red.") == "a trafficlight red"


def link(source: Path, target: Path, *without: str) -> Path:
    """A folder with the files of another."""
    target.mkdir()
    for path in source.iterdir():
        if path.name not in without:
            (target / path.name).write_bytes(path.read_bytes())
    return target


def test_the_end_of_text_is_added_where_the_file_leaves_it_to_the_settings(saved: dict[str, Any], tmp_path: Path):
    folder = link(saved["siglip2"][0], tmp_path / "m")
    save_tokenizer(folder, ends=False, add_eos_token=True)
    assert torch.equal(load_text(folder).encode(TEXTS), load_text(saved["siglip2"][0]).encode(TEXTS))


def test_a_tokeniser_saved_by_transformers(saved: dict[str, Any], tmp_path: Path):
    from transformers import PreTrainedTokenizerFast

    source = saved["siglip2"][0]
    folder = link(source, tmp_path / "m", "tokenizer_config.json")
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(source / "tokenizer.json")), pad_token="<pad>", eos_token="<eos>",
        padding_side="left",
    )  # fmt: skip
    made.save_pretrained(folder)
    assert torch.equal(load_text(folder).encode(TEXTS), load_text(source).encode(TEXTS))


def test_clip_without_tokenizer_json(saved: dict[str, tuple[Path, Any]], tmp_path: Path):
    folder = link(saved["clip"][0], tmp_path / "m", "tokenizer.json", "tokenizer_config.json")
    letters = [chr(i) for i in range(97, 109)]
    names = ["!", *letters, *(f"{letter}</w>" for letter in letters), "ca", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\n")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"bos_token_id": 26, "eos_token_id": 27}
    (folder / "config.json").write_text(json.dumps(config))
    ids, _ = load_text(folder).tokenize(["Cal b"])
    assert [names[i] for i in ids[0]] == ["<|startoftext|>", "ca", "l</w>", "b</w>", "<|endoftext|>"]


def test_refused_files(saved: dict[str, tuple[Path, Any]], tmp_path: Path):
    source = saved["siglip2"][0]
    with pytest.raises(MissingFile, match=r"tokenizer\.json.*save_pretrained"):
        load_text(link(source, tmp_path / "a", "tokenizer.json"))
    folder = link(source, tmp_path / "b", "tokenizer.json")
    (folder / "tokenizer.model").write_bytes(b"x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(MissingExtra, match="pip install sentencepiece"):
            load_text(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidCheckpoint, match="tokeniser"):
        load_text(folder)
    save_tokenizer(folder, ends=False, add_eos_token=True, eos_token="<absent>")
    with pytest.raises(InvalidCheckpoint, match="tokeniser"):
        load_text(folder)
    save_tokenizer(folder, pad_token=None)
    with pytest.raises(InvalidCheckpoint, match="padded"):
        load_text(folder)
    with pytest.raises(MissingFile, match=r"config\.json"):
        load_text(link(source, tmp_path / "c", "config.json"))
    with pytest.raises(MissingFile, match=r"model\.safetensors"):
        load_text(link(source, tmp_path / "d", "model.safetensors"))
    with pytest.raises(MissingFile, match="folder"):
        load_text(tmp_path / "nowhere")
    with pytest.raises(UnknownModel):
        load_text("no-such-model")
    folder = link(source, tmp_path / "e")
    (folder / "config.json").write_text("[]")
    with pytest.raises(InvalidCheckpoint, match="JSON object"):
        load_text(folder)
    (folder / "config.json").write_text('{"model_type": "clip", "text_config": {"hidden_size": "wide"}}')
    with pytest.raises(InvalidCheckpoint, match="describe the model"):
        load_text(folder)
    (folder / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(InvalidConfig, match=r'clip, siglip, siglip2, tipsv2; got "dinov2"'):
        load_text(folder)


def test_refused_weights(saved: dict[str, tuple[Path, Any]], tmp_path: Path):
    folder = link(saved["siglip2"][0], tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    name = "text_model.encoder.layers.1.mlp.fc1.weight"

    def load_with(values: dict[str, Tensor]) -> TextEncoder:
        save_file(values, folder / "model.safetensors")
        return load_text(folder)

    with pytest.raises(InvalidCheckpoint, match=r"missing: encoder\.layers\.1\.mlp\.fc1\.weight"):
        load_with({key: value for key, value in state.items() if key != name})
    with pytest.raises(InvalidCheckpoint, match="unexpected: other"):
        load_with(state | {"text_model.other": torch.ones(2)})
    with pytest.raises(InvalidCheckpoint, match="must fit"):
        load_with(state | {name: torch.ones(5, 16)})
    with pytest.raises(InvalidCheckpoint, match="text half"):
        load_with({key: value for key, value in state.items() if key.startswith("vision")})
    # what older versions wrote beside the weights does no harm
    assert load_with(state | {"text_model.embeddings.position_ids": torch.arange(12)[None]}).dim == 16
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(InvalidCheckpoint, match="whole"):
        load_text(folder)
    # a vision model, and weights of another family
    vision = link(saved["clip"][0], tmp_path / "v")
    (vision / "model.safetensors").write_bytes((saved["tipsv2"][0] / "model.safetensors").read_bytes())
    with pytest.raises(InvalidCheckpoint):
        load_text(vision)


def test_refused_texts(saved: dict[str, tuple[Path, Any]], tmp_path: Path):
    encoder = load_text(saved["clip"][0])
    for texts in ("cat", [3], ["cat", None]):
        with pytest.raises(InvalidPrompt, match="list of strings"):
            encoder.encode(texts)
    assert torch.equal(encoder.encode(text for text in ["cat", "dog"]), encoder.encode(["cat", "dog"]))
    folder = link(saved["clip"][0], tmp_path / "m")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["dog"] = 40
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    encoder = load_text(folder)
    encoder.encode(["cat"])
    with pytest.raises(IncompatibleModel, match="below 40; got 40"):
        encoder.encode(["dog"])


def test_names(saved: dict[str, tuple[Path, Any]], tmp_path: Path):
    folder = link(saved["clip"][0], tmp_path / "m")
    name = text_name(folder)
    assert name == text_name(f"dir:{folder}") == load_text(folder).name
    assert name.startswith(f"dir:{folder}@")
    os.utime(folder / "model.safetensors", (1, 1))
    assert text_name(folder) != name, "other weights in the same folder are another model"
    with pytest.raises(IncompatibleModel, match="know no words"):
        text_name("ren-dino-b8")
    with pytest.raises(ModelUnavailable, match=r"offline mode.*hf download google/siglip2-base"):
        load_text("siglip2-b16-256")


def test_a_card_names_the_tower(saved: dict[str, tuple[Path, Any]], tmp_path: Path):
    from opsin.cards import ModelCard

    tmp_path.joinpath("image").mkdir()
    ModelCard("x", "backbone", "radio", text=f"dir:{saved['siglip2'][0]}").save(tmp_path / "image/card.json")
    assert load_text(tmp_path / "image").name == text_name(saved["siglip2"][0])


def test_the_network_follows_its_weights(saved: dict[str, tuple[Path, Any]]):
    encoder = load_text(saved["siglip2"][0])
    assert isinstance(encoder, nn.Module)
    assert encoder.double().encode(["cat"]).dtype == torch.float64
    assert "dim=16" in repr(encoder)
