"""RADIO: every layout its weights are published in, its adaptors, and files that must be refused."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opsin import backbones, hub
from opsin.backbones import radio_checkpoint
from opsin.backbones.adaptors import Adaptor
from opsin.backbones.radio import RadioBackbone, interpolate_positions
from opsin.cards import catalogue, find
from opsin.errors import IncompatibleModel, InvalidCheckpoint, InvalidConfig, MissingFile, UnsupportedSize

DIM, PATCH, SIDE = 32, 8, 8
TEACHERS = ("clip", "siglip2", "siglip2-g", "sam")


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 10)


def block(prefix: str, dim: int, hidden: int, scale: str = "gamma") -> dict[str, Tensor]:
    """A timm transformer block; ``scale`` is the name of its LayerScale, empty for none."""
    state = {"attn.qkv": draw(3 * dim, dim), "attn.proj": draw(dim, dim), "mlp.fc1": draw(hidden, dim)}
    state |= {"mlp.fc2": draw(dim, hidden)}
    found = {f"{name}.weight": value for name, value in state.items()}
    found |= {f"{name}.bias": draw(len(value), seed=1) for name, value in state.items()}
    for norm in ("norm1", "norm2"):
        found |= {f"{norm}.weight": 1 + draw(dim, seed=2), f"{norm}.bias": draw(dim, seed=3)}
    if scale:
        found |= {f"ls{n}.{scale}": 1 + draw(dim, seed=4 + n) for n in (1, 2)}
    return {prefix + key: value for key, value in found.items()}


def mlp2(inputs: int, outputs: int, inner: int = 1, hidden: int = 24, pre_norm: bool = False) -> dict[str, Tensor]:
    state = {"fc1.weight": draw(hidden, inputs), "fc1.bias": draw(hidden)}
    steps = [(f"blocks.{i}", hidden) for i in range(inner)] + [("final", outputs)]
    for name, width in steps:
        state |= {f"{name}.0.weight": 1 + draw(hidden, seed=5), f"{name}.0.bias": draw(hidden, seed=6)}
        state |= {f"{name}.2.weight": draw(width, hidden, seed=7), f"{name}.2.bias": draw(width, seed=8)}
    if pre_norm:
        state |= {"pre_norm.0.weight": 1 + draw(inputs, seed=9), "pre_norm.0.bias": draw(inputs, seed=10)}
    return state


def mlp1(inputs: int, outputs: int, inner: int = 0, hidden: int = 24) -> dict[str, Tensor]:
    state = {"fc1.weight": draw(hidden, inputs), "fc1.bias": draw(hidden)}
    state |= {"norm.weight": 1 + draw(hidden, seed=5), "norm.bias": draw(hidden, seed=6)}
    for i in range(inner):
        state |= {f"inner.{3 * i}.weight": draw(hidden, hidden), f"inner.{3 * i}.bias": draw(hidden, seed=7)}
        state |= {f"inner.{3 * i + 1}.weight": 1 + draw(hidden), f"inner.{3 * i + 1}.bias": draw(hidden, seed=8)}
    return state | {"fc2.weight": draw(outputs, hidden), "fc2.bias": draw(outputs)}


def attn(dim: int, outputs: int) -> dict[str, Tensor]:
    state = {f"mlp.{key}": value for key, value in mlp2(dim, outputs).items()}
    return state | block("blocks.0.", dim, 2 * dim) | block("blocks.1.", dim, 2 * dim)


def put(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def base(scale: str = "gamma", dim: int = DIM, hidden: int = 2 * DIM) -> dict[str, Tensor]:
    state = {
        "patch_generator.embedder.weight": draw(dim, 3 * PATCH * PATCH),
        "patch_generator.pos_embed": draw(1, SIDE * SIDE, dim),
        "patch_generator.cls_token.token": draw(6, dim),
        "reg_token": draw(1, 4, dim),
    }
    return state | block("blocks.0.", dim, hidden, scale) | block("blocks.1.", dim, hidden, scale)


def weights(scale: str = "gamma") -> dict[str, Tensor]:
    """A checkpoint with two similarly named teachers, training state and statistics of its own for pixels."""
    return {
        **put("base_model.", base(scale)),
        "input_conditioner.norm_mean": torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1),
        "input_conditioner.norm_std": torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1),
        **put("_heads.siglip2.", mlp2(DIM, 20)),
        **put("_feature_projections.siglip2.", mlp2(DIM, 20, inner=2)),
        **put("_heads.siglip2-g.", mlp2(DIM, 28)),
        **put("_feature_projections.siglip2-g.", attn(DIM, 28)),
        **put("_feature_projections.3.", mlp2(DIM, 12)),  # sam, by its number
        "_loss_states.0.mean": torch.zeros(3),
        "_loss_fns.adaloss": torch.zeros(1),
    }


def args(**changes: Any) -> argparse.Namespace:
    models = {"siglip2": "siglip2-so400m", "siglip2-g": "siglip2-g-384"}
    teachers = [{"name": n, "model": models.get(n, n), "use_summary": n != "sam"} for n in TEACHERS]
    facts = {"teachers": teachers, "cls_token_per_teacher": True, "model_kwargs": {"num_heads": 2}, "cpe_max_size": 64}
    return argparse.Namespace(**{"model": "vit_base_patch16_v2_224", "mlp_version": "v2", **facts, **changes})


def checkpoint(path: Path, state: dict[str, Tensor] | None = None, **extra: Any) -> Path:
    content = {"arch": "vit", "epoch": 3, "state_dict": weights() if state is None else state, "args": args()}
    torch.save({**content, **extra}, path)
    return path


def memory(state: dict[str, Tensor] | None = None, **changes: Any) -> RadioBackbone:
    return radio_checkpoint.from_weights(weights() if state is None else state, args(**changes), name="tiny")


def pixels(h: int = 24, w: int = 40, batch: int = 1) -> Tensor:
    return torch.rand((batch, 3, h, w), generator=torch.Generator().manual_seed(h * w))


# ------------------------------------------------------------------------------------ what the weights amount to


def test_everything_is_read_off_keys_and_shapes() -> None:
    backbone = memory()
    config = backbone.model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.mlp_ratio) == (2, 2, 2.0)
    assert (config.patch_size, config.max_img_size) == (PATCH, PATCH * SIDE)
    assert (config.num_cls_tokens, config.num_registers, config.summary_idxs) == (4, 2, [0, 1, 2])
    card = backbone.card
    assert card.mean == pytest.approx((0.4, 0.5, 0.6))
    assert card.std == pytest.approx((0.2, 0.3, 0.25))
    assert card.adaptors == ("siglip2", "siglip2-g", "sam")
    assert card.text == "hf:google/siglip2-so400m-patch16-naflex"
    assert backbone.adaptor("siglip2-g").text == "hf:google/siglip2-giant-opt-patch16-384"
    assert [backbone.adaptor(name).token for name in ("siglip2", "siglip2-g", "sam")] == [1, 2, 3]
    output = backbone(pixels(batch=2))
    assert output.features.shape == (2, DIM, 3, 5)
    assert output.class_token.shape == (2, DIM)
    assert output.register_tokens.shape == (2, 5, DIM)
    assert backbone.summary(output, "siglip2").shape == (2, 20)


def test_layer_scale_under_either_name_and_absent() -> None:
    expected = memory()(pixels()).features
    assert torch.equal(memory(weights("grandma"))(pixels()).features, expected)
    ones = {k: torch.ones_like(v) if ".ls" in k else v for k, v in weights().items()}
    none = memory({k: v for k, v in weights().items() if ".ls" not in k})(pixels()).features
    assert torch.equal(none, memory(ones)(pixels()).features)
    assert not torch.equal(none, expected)


def test_a_name_that_begins_with_another_does_not_swallow_it() -> None:
    backbone = memory()
    tokens = draw(1, 4, DIM)
    assert backbone.adaptor("siglip2").head_mlp(tokens).shape[-1] == 20
    assert backbone.adaptor("siglip2-g").head_mlp(tokens).shape[-1] == 28
    alone = {k: v for k, v in weights().items() if "siglip2." not in k}
    assert memory(alone).card.adaptors == ("siglip2-g", "sam")


def test_a_teacher_by_its_number_and_a_head_that_is_not_there() -> None:
    sam = memory().adaptor("sam")
    assert sam.feat_mlp(draw(1, 15, DIM), (3, 5)).shape == (1, 15, 12)
    with pytest.raises(IncompatibleModel, match="summary head"):
        sam.head_mlp(draw(1, DIM))


def test_one_class_token_for_all_teachers() -> None:
    backbone = memory(cls_token_per_teacher=False)
    assert (backbone.model.config.num_cls_tokens, backbone.model.config.num_registers) == (1, 5)
    assert backbone.adaptor("siglip2-g").token == 0


@pytest.mark.parametrize("packed", ["mlp.fc1 mlp.fc2", "mlp.w12 mlp.w3"])
def test_gated_mlp(packed: str) -> None:
    first, second = packed.split()
    hidden = 24
    state = put("base_model.", base(hidden=hidden))
    for i in (0, 1):
        for key in ("weight", "bias"):
            state.pop(f"base_model.blocks.{i}.mlp.fc1.{key}")
            value = state.pop(f"base_model.blocks.{i}.mlp.fc2.{key}")
            state[f"base_model.blocks.{i}.{second}.{key}"] = value
        state[f"base_model.blocks.{i}.{first}.weight"] = draw(2 * hidden, DIM)
        state[f"base_model.blocks.{i}.{first}.bias"] = draw(2 * hidden)
    backbone = memory(state)
    mlp, tokens = backbone.model.encoder.layer[1].mlp, draw(1, 3, DIM)
    gate, up = (tokens @ draw(2 * hidden, DIM).T + draw(2 * hidden)).chunk(2, -1)
    name = f"base_model.blocks.1.{second}"
    expected = (torch.nn.functional.silu(gate) * up) @ state[f"{name}.weight"].T + state[f"{name}.bias"]
    torch.testing.assert_close(mlp(tokens), expected)


@pytest.mark.parametrize(("dim", "hidden", "heads"), [(1152, 4304, 16), (768, 3072, 12)])
def test_published_widths_need_no_statement_of_heads(dim: int, hidden: int, heads: int) -> None:
    state = put("base_model.", base(dim=dim, hidden=hidden))
    config, _, _ = radio_checkpoint.state(state, args(model_kwargs={}))
    assert config.num_attention_heads == heads
    assert int(config.hidden_size * config.mlp_ratio) == hidden
    with pytest.raises(InvalidCheckpoint, match="heads"):
        memory(model_kwargs={})


# -------------------------------------------------------------------------------------- spectral parametrisation


def parametrised(weight: Tensor, version: int | None, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """What a spectrally parametrised weight is stored as, and the weight it acts as, by singular values."""
    u, s, v = torch.linalg.svd(weight)
    scale = draw(1, 1, seed=seed) + 0.8
    state = {"_u": u[:, 0], "_v": v[0], "scale": scale}
    gain = scale.item()
    if version is not None:
        state["_sn_version"] = torch.tensor(version)
        gain = gain if version < 2 else torch.log1p(torch.tensor(gain).exp()).item() + 0.05
    return state, weight * (gain / s[0])


@pytest.mark.parametrize("version", [None, 1, 2])
def test_spectral_parametrisation_is_folded(version: int | None) -> None:
    plain, stored = weights(), weights()
    for name, scaled_parts in (("blocks.1.attn.proj", 1), ("blocks.1.attn.qkv", 3), ("blocks.0.attn.qkv", 2)):
        key = f"base_model.{name}"
        original = stored.pop(f"{key}.weight")
        stored[f"{key}.parametrizations.weight.original"] = original
        effective = []
        for part, rows in enumerate(original.chunk(3 if "qkv" in name else 1)):
            if part >= scaled_parts:  # values may be left alone
                effective.append(rows)
                continue
            state, weight = parametrised(rows, version, part)
            path = f"0.parts.{part}" if "qkv" in name else "0"
            stored |= put(f"{key}.parametrizations.weight.{path}.", state)
            effective.append(weight)
        plain[f"{key}.weight"] = torch.cat(effective)
    head = "_heads.siglip2.fc1"
    stored[f"{head}.parametrizations.weight.original"] = stored.pop(f"{head}.weight")
    state, plain[f"{head}.weight"] = parametrised(plain[f"{head}.weight"], version, 9)
    stored |= put(f"{head}.parametrizations.weight.0.", state)
    found, expected = radio_checkpoint.fold(stored), plain
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(memory(stored)(pixels()).features, memory(plain)(pixels()).features)


def test_a_torn_parametrisation_is_refused() -> None:
    state = weights()
    key = "base_model.blocks.0.attn.proj"
    state |= {f"{key}.parametrizations.weight.0.scale": torch.ones(1, 1)}
    with pytest.raises(InvalidCheckpoint, match="original"):
        memory(state)
    state[f"{key}.parametrizations.weight.original"] = state.pop(f"{key}.weight")
    with pytest.raises(InvalidCheckpoint, match="_u"):
        memory(state)
    state |= {f"{key}.parametrizations.weight.0.{name}": torch.ones(5) for name in ("_u", "_v")}
    with pytest.raises(InvalidCheckpoint, match=key):
        memory(state)


# ------------------------------------------------------------------------------------------------------ adaptors


def norm(tokens: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def linear(tokens: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return tokens @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def run_mlp2(tokens: Tensor, state: dict[str, Tensor], inner: int) -> Tensor:
    gelu = torch.nn.functional.gelu
    if "pre_norm.0.weight" in state:
        tokens = gelu(norm(tokens, state, "pre_norm.0"))
    tokens = linear(tokens, state, "fc1")
    for i in range(inner):
        tokens = tokens + linear(gelu(norm(tokens, state, f"blocks.{i}.0")), state, f"blocks.{i}.2")
    return linear(gelu(norm(tokens, state, "final.0")), state, "final.2")


@pytest.mark.parametrize("inner", [0, 2])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_mlp_v2(inner: int, pre_norm: bool) -> None:
    state, tokens = mlp2(DIM, 12, inner, pre_norm=pre_norm), draw(2, 15, DIM)
    adaptor = Adaptor.from_state_dict(state, {})
    torch.testing.assert_close(adaptor.head_mlp(tokens), run_mlp2(tokens, state, inner))
    torch.testing.assert_close(adaptor.head_mlp(tokens[0, 0]), adaptor.head_mlp(tokens)[0, 0])


@pytest.mark.parametrize("inner", [0, 1])
def test_mlp_v1(inner: int) -> None:
    state, tokens = mlp1(DIM, 12, inner), draw(2, 15, DIM)
    expected = norm(linear(tokens, state, "fc1"), state, "norm").relu()
    if inner:
        expected = norm(linear(expected, state, "inner.0"), state, "inner.1").relu()
    adaptor = Adaptor.from_state_dict(state, state, "v1")
    torch.testing.assert_close(adaptor.head_mlp(tokens), linear(expected, state, "fc2"))
    assert torch.equal(adaptor.feat_mlp(tokens, (3, 5)), adaptor.head_mlp(tokens))


def test_upsampling_lays_the_finer_grid_out_row_by_row() -> None:
    state, tokens = mlp2(DIM, 4 * 6), draw(2, 6, DIM)
    flat = Adaptor.from_state_dict({}, state).feat_mlp(tokens, (2, 3))
    fine = Adaptor.from_state_dict({}, state, upsample=2).feat_mlp(tokens, (2, 3)).view(2, 4, 6, 6)
    assert flat.shape == (2, 6, 24)
    for y in range(4):
        for x in range(6):
            cell, corner = (y // 2) * 3 + x // 2, (y % 2) * 2 + x % 2
            assert torch.equal(fine[:, y, x], flat[:, cell, corner * 6 : (corner + 1) * 6])


def test_attention_adaptor() -> None:
    state, tokens = attn(DIM, 12), draw(2, 15, DIM)
    x = tokens
    for name in ("blocks.0", "blocks.1"):
        qkv = linear(norm(x, state, f"{name}.norm1"), state, f"{name}.attn.qkv")
        q, k, v = (part.view(2, 15, 16, -1).transpose(1, 2) for part in qkv.chunk(3, -1))
        mixed = (q @ k.transpose(-1, -2) / (DIM / 16) ** 0.5).softmax(-1) @ v
        out = linear(mixed.transpose(1, 2).reshape(2, 15, DIM), state, f"{name}.attn.proj")
        x = x + out * state[f"{name}.ls1.gamma"]
        hidden = torch.nn.functional.gelu(linear(norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1"))
        x = x + linear(hidden, state, f"{name}.mlp.fc2") * state[f"{name}.ls2.gamma"]
    inner = {k.removeprefix("mlp."): v for k, v in state.items() if k.startswith("mlp.")}
    found = Adaptor.from_state_dict({}, state, "attn").feat_mlp(tokens, (3, 5))
    torch.testing.assert_close(found, run_mlp2(x, inner, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("state", "version", "message"),
    [
        (mlp2(8, 4), "v1", "is v1; got v2"),
        ({"fc1.weight": torch.zeros(2, 2)}, None, "one of v1, v2, attn"),
        ({k: v for k, v in mlp2(8, 4).items() if k != "fc1.weight"}, None, "fc1.weight"),
        ({k: v for k, v in mlp2(8, 4).items() if k != "blocks.0.2.bias"}, None, "missing: blocks.0.2.bias"),
        ({**mlp2(8, 4), "extra.weight": torch.zeros(1)}, None, "unexpected: extra.weight"),
        ({**mlp2(8, 4), "final.0.bias": torch.zeros(3)}, None, "wrong shape: final.0.bias"),
        ({k: v for k, v in attn(16, 4).items() if not k.startswith("mlp.fc1")}, None, "fc1.weight"),
        (attn(8, 4), None, "8 channels in 16 heads"),
    ],
)
def test_bad_adaptors(state: dict[str, Tensor], version: str | None, message: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=message):
        Adaptor.from_state_dict(state, {}, version)


def test_an_absent_adaptor_names_what_there_is_and_who_has_it() -> None:
    with pytest.raises(IncompatibleModel, match="sam, siglip2, siglip2-g") as caught:
        memory().adaptor("sam3")
    assert "c-radio_v4-h" in str(caught.value)
    assert "c-radio_v3-b" not in str(caught.value)
    with pytest.raises(IncompatibleModel, match="No known model"):
        memory().adaptor("poet")


# ----------------------------------------------------------------------------------------------------- positions


def test_positions_are_kept_and_stay_exact() -> None:
    backbone = memory()
    table = backbone.model.embeddings.position_embedding
    first = backbone.positions((3, 5))
    assert backbone.positions((3, 5)) is first
    assert torch.equal(first, interpolate_positions(table, (3, 5)))
    before = backbone(pixels()).features
    assert torch.equal(backbone(pixels()).features, before)  # from the cache
    with torch.no_grad():
        table.mul_(2)  # in place
    assert torch.equal(backbone.positions((3, 5)), interpolate_positions(table, (3, 5)))
    assert not torch.equal(backbone.positions((3, 5)), first)
    assert backbone.to(torch.float64).positions((3, 5)).dtype == torch.float64
    assert torch.equal(backbone.positions((8, 8)), backbone.model.embeddings.position_embedding)
    for height in range(1, 40):
        backbone.positions((height, 3))
    assert len(backbone._positions) < 20
    assert torch.equal(backbone.positions((3, 5)), interpolate_positions(table, (3, 5)))


def test_positions_made_in_inference_mode_serve_gradients() -> None:
    backbone, image = memory(), pixels().requires_grad_()
    with torch.inference_mode():
        backbone(pixels())
    backbone(image).features.sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0


def test_positions_follow_a_table_that_is_trained() -> None:
    backbone = memory()
    backbone.model.embeddings.position_embedding.requires_grad_()
    for _ in range(2):
        backbone(pixels()).features.sum().backward()
    assert backbone.model.embeddings.position_embedding.grad.abs().sum() > 0


@pytest.mark.parametrize("size", [(24, 40), (40, 24), (64, 64), (8, 8), (88, 120), (96, 8)])
def test_any_grid_gives_what_transformers_gives(size: tuple[int, int]) -> None:
    backbone = memory()
    output = backbone(pixels(*size))
    expected = backbone.model(pixels(*size))
    torch.testing.assert_close(output.features.flatten(2).mT, expected.features, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        assert torch.isfinite(backbone(pixels(*size)).features).all()


def test_sizes_that_are_no_multiple_of_the_patch() -> None:
    with pytest.raises(UnsupportedSize, match="24×32"):
        memory()(pixels(25, 30))


# --------------------------------------------------------------------------------- files, folders and references


def same(first: RadioBackbone, second: RadioBackbone) -> None:
    torch.testing.assert_close(first(pixels()).features, second(pixels()).features, rtol=1e-5, atol=1e-5)
    for name in ("siglip2", "siglip2-g", "sam"):
        tokens = draw(1, 15, DIM)
        a, b = first.adaptor(name), second.adaptor(name)
        assert (a.token, a.text) == (b.token, b.text)
        torch.testing.assert_close(a.feat_mlp(tokens, (3, 5)), b.feat_mlp(tokens, (3, 5)), rtol=1e-5, atol=1e-5)


def test_checkpoint_converted_once_saved_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path / "tiny_half.pth.tar")
    expected = memory()
    backbone = backbones.load(str(path), device="cpu")
    assert isinstance(backbone, RadioBackbone)
    assert backbone.name == f"dir:{path}"
    assert backbone.card.adaptors == expected.card.adaptors
    assert not backbone.adaptors  # nothing read before it is asked for
    same(backbone, expected)
    (folder,) = (hub.cache_dir() / "radio").glob("tiny_half-*")
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert names == [
        "adaptors/sam.safetensors", "adaptors/siglip2-g.safetensors", "adaptors/siglip2.safetensors", "card.json",
        "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip
    assert "embeddings.position_embedding" in load_file(folder / "model.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(radio_checkpoint, "convert", lambda *_: pytest.fail("converted again"))
        for ref in (path, f"dir:{path}", f"dir:{tmp_path}", tmp_path):
            same(backbones.load(ref, device="cpu"), expected)
    os.utime(path, (1, 1))
    backbones.load(path, device="cpu")
    assert len(list((hub.cache_dir() / "radio").glob("tiny_half-*"))) == 2  # another file, as far as can be known
    backbone.save_pretrained(tmp_path / "saved")
    again = backbones.load(f"dir:{tmp_path / 'saved'}", device="cpu", dtype="float64")
    assert again.card == backbone.card
    assert again.adaptor("siglip2").head_mlp(draw(1, DIM).double()).dtype == torch.float64
    same(again.float(), expected)
    expected.save_pretrained(tmp_path / "memory")  # adaptors that no file has yet
    same(backbones.load(tmp_path / "memory", device="cpu"), expected)


def test_half_precision_file_and_the_older_format(tmp_path: Path) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in weights().items()}
    torch.save({"state_dict": half, "args": args()}, tmp_path / "a.pth.tar", _use_new_zipfile_serialization=False)
    backbone = backbones.load(tmp_path / "a.pth.tar", device="cpu")
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    (folder,) = (hub.cache_dir() / "radio").glob("a-*")
    assert load_file(folder / "model.safetensors")["embeddings.position_embedding"].dtype == torch.float16
    torch.testing.assert_close(backbone(pixels()).features, memory()(pixels()).features, rtol=0.05, atol=0.05)


def test_the_average_of_the_weights_is_preferred(tmp_path: Path) -> None:
    wrong = {key: torch.zeros_like(value) for key, value in weights().items()}
    path = checkpoint(tmp_path / "ema.pth.tar", wrong, state_dict_ema=weights())
    same(backbones.load(path, device="cpu"), memory())


def test_catalogue_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = find("c-radio_v3-b")
    state = {**put("base_model.", base(dim=768, hidden=16)), **put("_heads.siglip2.", mlp2(768, 20))}
    kernel = draw(768, 3 * 16 * 16)
    state["base_model.patch_generator.embedder.weight"] = kernel
    checkpoint(tmp_path / card.files[0], state)
    monkeypatch.setattr(hub, "resolve", lambda ref, **_: tmp_path)
    backbone = backbones.load("c-radio_v3-b", device="cpu")
    assert backbone.name == "c-radio_v3-b"
    assert backbone.card.licence == card.licence
    assert backbone.card.image_size == 512
    assert backbone.card.adaptors == ("siglip2",)  # what is there, not what was announced
    backbone.save_pretrained(tmp_path / "saved")
    assert backbones.load(tmp_path / "saved", device="cpu").card == backbone.card
    (tmp_path / find("c-radio_v3-l").files[0]).write_bytes((tmp_path / card.files[0]).read_bytes())
    with pytest.raises(InvalidCheckpoint, match="c-radio_v3-l have"):
        backbones.load("c-radio_v3-l", device="cpu")


def hub_folder(folder: Path, config: dict[str, Any], scale: str = "grandma") -> Path:
    folder.mkdir()
    state = {f"radio_model.model.{key}": value for key, value in base(scale).items()}
    state |= {f"radio_model.{k}": v for k, v in weights().items() if k.startswith("input_conditioner.")}
    state["radio_model.summary_idxs"] = torch.tensor([0, 1, 2])
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    return folder


def test_hub_layout_with_training_arguments(tmp_path: Path) -> None:
    config = {"architectures": ["RADIOModel"], "args": vars(args()), "preferred_resolution": [56, 56]}
    folder = hub_folder(tmp_path / "hub", config)
    backbone = backbones.load(folder, device="cpu")
    assert torch.equal(backbone(pixels()).features, memory()(pixels()).features)
    assert backbone.card.mean == pytest.approx((0.4, 0.5, 0.6))
    assert backbone.image_size == 56
    with pytest.raises(IncompatibleModel, match="no adaptor at all") as caught:
        backbone.adaptor("siglip2")
    assert "c-radio_v3-b, c-radio_v3-l" in str(caught.value)


@pytest.mark.parametrize("scale", ["grandma", ""])
def test_hub_keys_with_a_config_of_transformers(tmp_path: Path, scale: str) -> None:
    config = memory().model.config.to_dict()
    backbone = backbones.load(hub_folder(tmp_path / "hub", config, scale), device="cpu")
    plain = weights(scale)
    assert torch.equal(backbone(pixels()).features, memory(plain)(pixels()).features)
    assert backbone.model.config.summary_idxs == [0, 1, 2]


def test_from_config_follows_the_stated_normalisation() -> None:
    config = {"model_type": "radio", **{k: v for k, v in memory().model.config.to_dict().items() if k != "model_type"}}
    backbone = backbones.from_config(config, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), image_size=32, device="cpu")
    assert isinstance(backbone, RadioBackbone)
    assert backbone.card.mean == (0.1, 0.2, 0.3)
    shown = (pixels() - torch.tensor(backbone.card.mean).view(3, 1, 1)) / torch.tensor(backbone.card.std).view(3, 1, 1)
    torch.testing.assert_close(backbone.model.input_conditioner(pixels()), shown)
    assert "radio" in backbones.families()


# ---------------------------------------------------------------------------------------- what has to be refused


class Malicious:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("executed",)


def test_a_checkpoint_that_would_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = checkpoint(tmp_path / "evil.pth.tar", args=argparse.Namespace(teachers=[], trick=Malicious()))
    with pytest.raises(InvalidCheckpoint, match="only tensors"):
        backbones.load(path)
    plain = tmp_path / "plain.pth.tar"
    plain.write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(InvalidCheckpoint):
        backbones.load(plain)
    assert not (tmp_path / "executed").exists()
    assert not list((hub.cache_dir() / "radio").glob("*evil*"))


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path / "whole.pth.tar").read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "whole"),
        (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-LFS"),
        (b"", "empty"),
    ):
        path = tmp_path / "bad.pth.tar"
        path.write_bytes(content)
        with pytest.raises(InvalidCheckpoint, match=message):
            backbones.load(path)
    with pytest.raises(MissingFile):
        backbones.load(tmp_path / "absent.pth.tar")
    with pytest.raises(InvalidConfig, match="one model"):
        backbones.load(tmp_path)
    for content in ({"model": {}}, [1, 2], {"state_dict": weights()}):
        torch.save(content, tmp_path / "other.pth.tar")
        with pytest.raises(InvalidCheckpoint, match="state_dict and args"):
            backbones.load(tmp_path / "other.pth.tar")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model.blocks.1.norm1.weight": None}, "missing: encoder.layer.1.norm1.weight"),
        ({"base_model.blocks.0.attn.qkv.bias": None}, "missing: encoder.layer.0.attention.q_proj.bias"),
        ({"base_model.blocks.0.attn.q_norm.weight": torch.ones(16)}, "unexpected: encoder.layer.0.attn.q_norm.weight"),
        ({"base_model.blocks.1.mlp.fc1.bias": torch.ones(3)}, "wrong shape"),
        ({"base_model.patch_generator.pos_embed": None}, "before 2.5"),
        ({"base_model.patch_generator.cls_token.token": torch.ones(2, DIM)}, "class token per teacher"),
        ({"base_model.norm.weight": torch.ones(DIM)}, "final norm"),
        ({"_feature_normalizer.mean": torch.ones(DIM)}, "feature normaliser"),
    ],
)
def test_keys_that_do_not_fit(change: dict[str, Tensor | None], message: str) -> None:
    state = {key: value for key, value in {**weights(), **change}.items() if value is not None}
    with pytest.raises((InvalidCheckpoint, IncompatibleModel), match=message):
        memory(state)


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(IncompatibleModel, match="final norm"):
        memory(model_norm=True)
    with pytest.raises(InvalidCheckpoint, match="class token per teacher"):
        memory(teachers=[])
    with pytest.raises(InvalidCheckpoint, match="has a name"):
        memory(teachers=[{"model": "x"}])
    with pytest.raises(InvalidCheckpoint, match="base_model"):
        memory({"encoder.weight": torch.ones(1)})


def test_adaptor_names_stay_inside_their_folder(tmp_path: Path) -> None:
    state = {**put("base_model.", base()), **put("_heads.../../x.", mlp2(DIM, 4))}
    facts = args(teachers=[{"name": "../../x"}])
    with pytest.raises(InvalidCheckpoint, match="plain name"):
        radio_checkpoint.convert(checkpoint(tmp_path / "a.pth.tar", state, args=facts), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_damaged_weights(tmp_path: Path) -> None:
    memory().save_pretrained(tmp_path / "m")
    file = tmp_path / "m/adaptors/sam.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(InvalidCheckpoint, match="whole"):
        backbones.load(tmp_path / "m", device="cpu")
    file.unlink()
    (tmp_path / "m/model.safetensors").write_bytes(b"<html>")
    with pytest.raises(InvalidCheckpoint, match="web page"):
        backbones.load(tmp_path / "m", device="cpu")
    (tmp_path / "m/model.safetensors").unlink()
    with pytest.raises(MissingFile, match=r"model\.safetensors"):
        backbones.load(tmp_path / "m", device="cpu")


def test_catalogue_entries() -> None:
    listed = {name for name, card in catalogue().items() if card.family == "radio"}
    sizes = {"b": 768, "l": 1024, "h": 1280, "g": 1536}
    assert listed == {
        *(f"c-radio_v3-{s}" for s in sizes), *(f"radio_v2.5-{s}" for s in sizes),
        "c-radio_v4-so400m", "c-radio_v4-h", "c-radio_v2-g", "c-radio_v2-vlm-h",
    }  # fmt: skip
    for name in listed:
        card = find(name)
        assert len(card.files) == 1
        assert card.files[0].endswith(".pth.tar")
        assert card.dim == sizes.get(name.rsplit("-", 1)[1], 1152)
        assert ("non-commercial" in card.licence) == name.startswith("radio_")
        assert bool(card.text) == bool({"siglip", "siglip2", "siglip2-g"} & set(card.adaptors))


BLOCKS = {768: (12, 12, 4), 1024: (24, 16, 4), 1152: (27, 16, 4304 / 1152), 1280: (32, 16, 4), 1536: (40, 24, 4)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, card in catalogue().items() if card.family == "radio"])
def test_catalogue_facts_fit_networks_of_the_published_size(name: str) -> None:
    """Width, patch, parameters and grid, on the meta device: nothing is downloaded and nothing allocated."""
    card = find(name)
    depth, heads, ratio = BLOCKS[card.dim]
    tokens = 10 if "_v4" in name or "vlm" in name else 8
    config = {
        "model_type": "radio", "hidden_size": card.dim, "num_hidden_layers": depth, "num_attention_heads": heads,
        "mlp_ratio": float(ratio), "use_swiglu_ffn": name in ("c-radio_v2-g", "radio_v2.5-g"),
        "patch_size": card.patch_size, "image_size": card.image_size, "max_img_size": 128 * card.patch_size,
        "num_cls_tokens": 4, "num_registers": tokens - 4,
    }  # fmt: skip
    backbone = backbones.from_config(config, mean=card.mean, std=card.std, device="meta")
    found = backbone.card
    facts = (card.family, card.dim, card.patch_size, card.image_size, card.parameters, card.mean, card.std)
    expected = (found.family, found.dim, found.patch_size, found.image_size, found.parameters, found.mean, found.std)
    assert facts == expected
    grid = card.image_size // card.patch_size
    out = backbone(torch.empty(1, 3, card.image_size, card.image_size, device="meta"))
    assert out.features.shape == (1, card.dim, grid, grid)
    assert out.register_tokens.shape == (1, tokens - 1, card.dim)
