"""The codec against the published code of btnk_mae, on the golden weights."""

from __future__ import annotations

import json
import zlib
from ast import literal_eval
from functools import cache

import numpy as np
import pytest
import torch

from opsin.codec.patches import patch_target, patchify, reconstruction_loss, sincos_positions, unpatchify
from tests.conftest import draw, golden_path
from tests.parity.adapters_codec import (
    codec_decode,
    codec_encode,
    codec_full,
    codec_losses,
    codec_model,
    tensors,
)

MODES = ("n002", "fan")
ACTS = ("none", "relu", "gelu", "swish", "tanh", "sigmoid")
DTYPES = {"f32": np.float32, "f64": np.float64}
TINY = {"heads": 4, "decoder_heads": 4, "patch": 16}
BASE = {"heads": 12, "decoder_heads": 16, "patch": 16}
TOLERANCE = {"f32": 1e-5, "f64": 1e-11}


@cache
def load(name):
    with np.load(golden_path(name, "btnk_mae")) as file:
        return dict(file)


@cache
def key_lists():
    return json.loads(golden_path("state_dict_keys.json", "btnk_mae").read_text())


def value(key, shape, mode, side):
    if key.endswith("pos_embed"):
        row = shape[1] == side * side + 1
        return sincos_positions(shape[-1], (side, side), class_row=row).numpy()
    noise = draw(key, shape)
    last, *before = key.split(".")[::-1]
    if mode == "n002":
        found = 0.02 * noise
    elif len(shape) >= 2 and key.endswith("weight"):
        found = noise * (1.0 / (noise.numel() / shape[0]) ** 0.5)
    else:
        found = 0.2 * noise
    if last == "weight" and before and "norm" in before[0]:
        found = found + 1.0
    return found.numpy()


@cache
def weights(size, mode, dtype="f32"):
    side = 4 if size == "tiny" else 14
    return tuple(
        {key: value(key, tuple(shape), mode, side).astype(DTYPES[dtype]) for key, shape, _ in key_lists()[size][part]}
        for part in ("enc_model", "dec_model")
    )


def fingerprint(name, tensor):
    tensor = np.asarray(tensor, dtype=np.float64).ravel()
    probe = torch.randn(tensor.size, generator=torch.Generator("cpu").manual_seed(zlib.crc32(f"proj/{name}".encode())))
    norm = np.sqrt((tensor**2).sum())
    return np.array([tensor.size, tensor.sum(), norm, np.abs(tensor).max(), tensor @ probe.double().numpy()])


def assert_prints(found, expected, relative):
    """Sum and probe against the noise that ``relative`` errors of each value leave in them."""
    room = relative * expected[2] * 4 + 1e-13
    assert found[0] == expected[0]
    np.testing.assert_allclose(found[1:], expected[1:], rtol=relative, atol=room)


def act_name(act):
    return None if act == "none" else act


@pytest.mark.parametrize("size", ["tiny", "base", "large", "large_gan", "huge"])
def test_keys_shapes_and_what_is_trained(size):
    from opsin.codec.config import SIZES, CodecConfig
    from opsin.codec.decoder import CodecDecoder
    from opsin.codec.encoder import CodecEncoder

    config = CodecConfig(96, 3, 4, 64, 2, 4, 16, (64, 64)) if size == "tiny" else SIZES[size]
    with torch.device("meta"):
        halves = {"enc_model": CodecEncoder(config), "dec_model": CodecDecoder(config)}
    for name, module in halves.items():
        trained = {key: p.requires_grad for key, p in module.named_parameters()}
        found = [[key, list(t.shape), trained[key]] for key, t in module.state_dict().items()]
        assert sorted(found) == sorted(key_lists()[size][name])


def test_filler():
    check = json.loads(golden_path("filler_check.json", "btnk_mae").read_text())
    for mode in MODES:
        for prefix, half in zip(("enc", "dec"), weights("tiny", mode), strict=True):
            for key, tensor in half.items():
                expected = check[mode][f"{prefix}.{key}"]
                np.testing.assert_allclose(tensor.ravel()[:4], expected["first4"][: tensor.size], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("mode", MODES)
def test_tiny_forward(mode, act, dtype):
    golden = load(f"tiny_forward_{mode}.npz")
    enc, dec = weights("tiny", mode, dtype)
    images = golden["x"].astype(DTYPES[dtype])
    tolerance = TOLERANCE[dtype]
    latent = codec_encode(enc, heads=4, patch=16, act=act_name(act), images=images)
    code = codec_decode(dec, heads=4, decoder_heads=4, patch=16, vectors=latent[:, 0])
    full = codec_full(dec, decoder_heads=4, patch=16, tokens=latent)
    assert latent.dtype == code.dtype == full.dtype == DTYPES[dtype]
    np.testing.assert_allclose(latent, golden[f"{act}_latent_{dtype}"], atol=tolerance, rtol=0)
    for name, found in (("btnk", code), ("full", full)):
        if f"{act}_{name}_{dtype}" in golden:
            np.testing.assert_allclose(found, golden[f"{act}_{name}_{dtype}"], atol=tolerance, rtol=0)
        assert_prints(fingerprint(name, found), golden[f"{act}_{name}_fp_{dtype}"], tolerance)
    model = codec_model(enc, dec, heads=4, decoder_heads=4, act=act_name(act), images=images)
    pixels = torch.from_numpy(images)
    with torch.no_grad():
        assert torch.allclose(model.encoder.bottleneck(pixels), torch.from_numpy(latent[:, 0]), atol=tolerance, rtol=0)
        found = [model.losses(pixels, (1.0, 1.0), norm_pix=norm) for norm in (False, True)]
        losses = [float(parts[name]) for parts in found for name in ("bottleneck", "full")]
    np.testing.assert_allclose(losses, golden[f"{act}_losses_{dtype}"], rtol=tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_every_step_of_the_way(mode):
    golden = load(f"tiny_forward_{mode}.npz")
    enc, dec = weights("tiny", mode, "f64")
    images = golden["x"].astype(np.float64)
    model = codec_model(enc, dec, heads=4, decoder_heads=4, act=None, images=images)
    encoder, decoder, seen = model.encoder, model.decoder, {}

    def watch(name, module):
        module.register_forward_hook(lambda m, given, out: seen.__setitem__(name, out.detach()))

    watch("patch_embed", encoder.mae_encoder.patch_embed.proj)
    watch("enc_norm", encoder.mae_encoder.norm)
    watch("kv_norm", decoder.patch_recon.kv_norm)
    watch("cross_attn_out", decoder.patch_recon.attn)
    watch("patch_recon", decoder.patch_recon)
    watch("decoder_embed", decoder.mae_decoder.decoder_embed)
    watch("decoder_norm", decoder.mae_decoder.decoder_norm)
    halves = {"enc_block": encoder.mae_encoder.blocks, "dec_block": decoder.mae_decoder.decoder_blocks}
    for prefix, blocks in halves.items():
        for i, block in enumerate(blocks):
            watch(f"{prefix}{i}", block)
    with torch.no_grad():
        decoder(encoder(torch.from_numpy(images))[:, 0])
    seen["patch_embed"] = seen["patch_embed"].flatten(2).transpose(1, 2)
    seen["cross_attn_out"] = seen["cross_attn_out"][:, None].expand(-1, 16, -1)
    hooks = {key[5:-4] for key in golden if key.startswith("hook_")}
    assert hooks - set(seen) == {"q_norm"}  # dead work, gone
    for name in hooks & set(seen):
        np.testing.assert_allclose(seen[name].numpy(), golden[f"hook_{name}_f64"], atol=1e-11, rtol=0, err_msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_patches_and_pixels(mode):
    golden = load(f"tiny_forward_{mode}.npz")
    target = patch_target(torch.from_numpy(golden["x"]), 16)
    assert torch.equal(target, torch.from_numpy(golden["target"]))
    tokens = torch.from_numpy(golden["none_btnk_f32"])
    picture = unpatchify(tokens, 16)
    assert torch.equal(picture, torch.from_numpy(golden["none_btnk_img_f32"]))
    assert torch.equal(patchify(picture, 16), tokens)
    model = codec_model(*weights("tiny", mode), heads=4, decoder_heads=4, act=None, images=golden["x"])
    shown = (model.denormalise(picture) * 255).permute(0, 2, 3, 1).numpy()
    # the published code truncates; where a value is whole up to rounding, either neighbour is right
    assert np.abs(shown - golden["none_btnk_uint8"] - 0.5).max() <= 0.5 + 1e-3


def parameters(model):
    halves = (("enc", model.encoder), ("dec", model.decoder))
    return {f"{part}.{key}": p for part, module in halves for key, p in module.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coefficient", [0.1, 1.0, 0.0])
@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize("mode", MODES)
def test_tiny_gradients(mode, act, coefficient, dtype):
    golden, prefix = load(f"tiny_grads_{mode}.npz"), f"{act}_c{coefficient:g}_{dtype}"
    images = load(f"tiny_forward_{mode}.npz")["x"].astype(DTYPES[dtype])
    found = codec_losses(
        *weights("tiny", mode, dtype), **TINY, act=act_name(act), images=images, coefficients=(1.0, coefficient)
    )
    relative = {"f32": 3e-5, "f64": 1e-10}[dtype]
    assert found["loss"] == pytest.approx(float(golden[f"{prefix}_loss"]), rel=relative)
    assert found["grad_norm"] == pytest.approx(float(golden[f"{prefix}_gradnorm"]), rel=relative)
    names = [str(name) for name in golden["param_names"]]
    assert set(names) - set(found["grads"]) == {str(name) for name in golden[f"{prefix}_nograd"]}
    scale = found["grad_norm"] * relative  # true zeros are noise of that size
    for name, expected in zip(names, golden[f"{prefix}_fp"], strict=True):
        if name in found["grads"]:
            print_ = fingerprint(name, found["grads"][name])
            np.testing.assert_allclose(print_[1:], expected[1:], rtol=relative, atol=scale, err_msg=name)
    for key in (k for k in golden if k.startswith(f"{prefix}_grad/")):
        name = key.split("/", 1)[1]
        np.testing.assert_allclose(found["grads"][name], golden[key], rtol=0, atol=scale, err_msg=name)


def adamw(model, encoder_rate, decoder_rate):
    groups = [
        {"params": [p for p in half.parameters() if p.requires_grad], "lr": rate}
        for half, rate in ((model.encoder, encoder_rate), (model.decoder, decoder_rate))
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.05)


# The key third of a self-attention's bias has a true gradient of zero: Adam moves it by the sign of noise.
def steady(name):
    return not name.endswith("attn.qkv.bias")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_one_step(mode, dtype):
    golden = load(f"tiny_step_{mode}.npz")
    images = torch.from_numpy(load(f"tiny_forward_{mode}.npz")["x"].astype(DTYPES[dtype]))
    model = codec_model(*weights("tiny", mode, dtype), heads=4, decoder_heads=4, act=None, images=images.numpy())
    optimiser = adamw(model, 1e-4, 1e-3)
    model.losses(images, (1.0, 0.1))["loss"].backward()
    optimiser.step()
    relative, absolute = {"f32": (2e-4, 2e-4), "f64": (1e-9, 1e-8)}[dtype]
    with torch.no_grad():
        after = float(model.losses(images, (1.0, 0.1))["loss"])
    assert after == pytest.approx(float(golden[f"a_loss_after_{dtype}"]), rel={"f32": 1e-4, "f64": 1e-7}[dtype])
    found = parameters(model)
    for name, expected in zip(golden["param_names"], golden[f"a_fp_{dtype}"], strict=True):
        if steady(str(name)):
            print_ = fingerprint(str(name), found[str(name)].detach().numpy())
            np.testing.assert_allclose(
                print_[2:4], expected[2:4], rtol=relative, atol=absolute, err_msg=str(name)
            )
    for key in (k for k in golden if k.startswith(f"a_{dtype}/") and steady(k)):
        tensor = found[key.split("/", 1)[1]].detach().numpy()
        wrong = np.abs(tensor - golden[key]) > {"f32": 1e-5, "f64": 1e-9}[dtype]
        assert wrong.mean() < 0.02, key  # Adam's first step is a sign: it turns where a gradient is rounding noise


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_three_published_epochs(mode, dtype):
    """Six batches an epoch, two to a step, their schedule: the losses of every batch and the weights after.

    In float32 what Adam makes of rounding (biases of keys) grows over the steps: there the weights are compared as what
    they give, a hundred times more loosely.
    """
    golden = load(f"tiny_step_{mode}.npz")
    images = load(f"tiny_forward_{mode}.npz")["x"].astype(DTYPES[dtype])
    model = codec_model(*weights("tiny", mode, dtype), heads=4, decoder_heads=4, act=None, images=images)
    optimiser, losses = adamw(model, 1e-3, 1e-3), np.zeros((3, 6, 2))
    peak, floor, warmup, epochs = 1e-3, 1e-5, 2, 10
    for epoch in range(3):
        for i in range(6):
            at = epoch + i / 6
            if i % 2 == 0:
                rate = peak * at / warmup
                if at >= warmup:
                    rate = floor + (peak - floor) / 2 * (1 + np.cos(np.pi * (at - warmup) / (epochs - warmup)))
                for group in optimiser.param_groups:
                    group["lr"] = rate
            batch = draw(f"input/batch{i}", (2, 3, 64, 64)).to(model.encoder.cls_token.dtype)
            found = model.losses(batch, (1.0, 0.1))
            losses[epoch, i] = found["bottleneck"].item(), found["full"].item()
            (found["loss"] / 2).backward()
            if i % 2:
                optimiser.step()
                optimiser.zero_grad()
    rates = [group["lr"] for group in optimiser.param_groups]
    relative, absolute, exact = {"f32": (3e-4, 2e-2, 1e-6), "f64": (1e-7, 1e-6, 1e-12)}[dtype]
    np.testing.assert_allclose(losses, golden[f"b_losses_{dtype}"], rtol=relative)
    np.testing.assert_allclose(rates, golden[f"b_lr_end_{dtype}"], rtol=exact)
    with torch.no_grad():
        latent = model.encoder(torch.from_numpy(images))
        np.testing.assert_allclose(latent.numpy(), golden[f"b_latent_after_{dtype}"], atol=absolute)
        np.testing.assert_allclose(model.decoder(latent[:, 0]).numpy(), golden[f"b_btnk_after_{dtype}"], atol=absolute)
    found = parameters(model)
    for name, expected in zip(golden["param_names"], golden[f"b_fp_{dtype}"], strict=True):
        if steady(str(name)):
            print_ = fingerprint(str(name), found[str(name)].detach().numpy())
            np.testing.assert_allclose(print_[2], expected[2], rtol=10 * relative, atol=absolute, err_msg=str(name))


@pytest.mark.parametrize("side", [96, 32])
@pytest.mark.parametrize("mode", MODES)
def test_resize(mode, side):
    golden, small = load(f"tiny_resize_{mode}.npz"), load(f"tiny_forward_{mode}.npz")["x"]
    model = codec_model(*weights("tiny", mode), heads=4, decoder_heads=4, act=None, images=small)
    encoder, decoder = model.encoder, model.decoder
    torch.manual_seed(123)
    model.resize(side, compat="published")
    tables = {
        "enc_pos": encoder.pos_embed, "dec_pos": decoder.pos_embed, "learned_seed123": decoder.learned_embed,
        "mae_dec_pos": decoder.mae_decoder.decoder_pos_embed,
    }  # fmt: skip
    for name, table in tables.items():
        assert torch.equal(table.detach(), torch.from_numpy(golden[f"sincos{side}_{name}"])), name
    decoder.learned_embed.data = torch.from_numpy(
        value("learned_embed", tuple(decoder.learned_embed.shape), mode, side // 16)
    )
    images = torch.from_numpy(golden[f"x{side}"])
    with torch.no_grad():
        latent = encoder(images)
        found = {"latent": latent, "btnk": decoder(latent[:, 0]), "full": decoder.full(latent)}
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor.numpy(), golden[f"sincos{side}_{name}"], atol=1e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize("compat", [None, "published"])
@pytest.mark.parametrize("side", [96, 32])
@pytest.mark.parametrize("mode", MODES)
def test_resize_of_learned_positions(mode, side, compat):
    golden, small = load(f"tiny_resize_{mode}.npz"), load(f"tiny_forward_{mode}.npz")["x"]
    enc, dec = weights("tiny", mode)
    enc = {**enc, "pos_embed": golden[f"interp{side}_src"]}
    encoder = codec_model(enc, dec, heads=4, decoder_heads=4, act=None, images=small).encoder
    table = encoder.pos_embed.requires_grad_()
    encoder.resize(side, compat=compat)
    assert encoder.pos_embed is table
    assert table.requires_grad == bool(golden[f"interp{side}_requires_grad"])
    np.testing.assert_allclose(table.detach().numpy(), golden[f"interp{side}_enc_pos"], atol=1e-6, rtol=0)
    with torch.no_grad():
        latent = encoder(torch.from_numpy(golden[f"x{side}"]))
    np.testing.assert_allclose(latent.numpy(), golden[f"interp{side}_latent"], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_base_forward(mode):
    golden = load(f"base_224_{mode}.npz")
    enc, dec = weights("base", mode)
    images = draw("input/base", (1, 3, 224, 224)).numpy()
    for act in ACTS:
        latent = codec_encode(enc, heads=12, patch=16, act=act_name(act), images=images)
        code = codec_decode(dec, heads=12, decoder_heads=16, patch=16, vectors=latent[:, 0])
        full = codec_full(dec, decoder_heads=16, patch=16, tokens=latent)
        np.testing.assert_allclose(latent[:, 0], golden[f"{act}_cls"], atol=2e-5, rtol=0)
        for name, tensor in (("latent", latent), ("btnk", code), ("full", full)):
            assert_prints(fingerprint(name, tensor), golden[f"{act}_{name}_fp"], 1e-5)
        target = patch_target(torch.from_numpy(images), 16)
        losses = [float((torch.from_numpy(p) - target).square().mean()) for p in (code, full)]
        np.testing.assert_allclose(losses, golden[f"{act}_losses"], rtol=1e-5)
        if act == "none":
            kept = golden["none_latent"] if "none_latent" in golden else golden["none_latent_first16"]
            np.testing.assert_allclose(latent[:, : kept.shape[1]], kept, atol=2e-5, rtol=0)
            np.testing.assert_allclose(code[:, :64], golden["none_btnk_first64"], atol=2e-5, rtol=0)
            np.testing.assert_allclose(full[:, :64], golden["none_full_first64"], atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_base_forward_in_float64(mode):
    golden = load(f"base_224_{mode}.npz")
    enc, dec = ({k: v.astype(np.float64) for k, v in half.items()} for half in weights("base", mode))
    images = draw("input/base", (1, 3, 224, 224)).double().numpy()
    latent = codec_encode(enc, heads=12, patch=16, act=None, images=images)
    code = codec_decode(dec, heads=12, decoder_heads=16, patch=16, vectors=latent[:, 0])
    full = codec_full(dec, decoder_heads=16, patch=16, tokens=latent)
    np.testing.assert_allclose(latent[:, 0], golden["none_cls_f64"], atol=1e-10, rtol=0)
    for name, tensor in (("latent", latent), ("btnk", code), ("full", full)):
        assert_prints(fingerprint(name, tensor), golden[f"none_{name}_fp_f64"], 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_base_training_step(mode):
    golden = load(f"base_224_{mode}.npz")
    images = draw("input/base2", (2, 3, 224, 224))
    model = codec_model(*weights("base", mode), heads=12, decoder_heads=16, act=None, images=images.numpy())
    optimiser = adamw(model, 1e-4, 1e-3)
    loss = model.losses(images, (1.0, 0.1))["loss"]
    loss.backward()
    found = {name: p.grad for name, p in parameters(model).items() if p.grad is not None}
    norm = float(torch.nn.utils.get_total_norm(list(found.values())))
    assert loss.item() == pytest.approx(float(golden["g_loss"]), rel=1e-5)
    assert norm == pytest.approx(float(golden["g_gradnorm"]), rel=1e-4)
    names = [str(name) for name in golden["param_names"]]
    for name, expected in zip(names, golden["g_fp"], strict=True):
        assert (name in found) != bool(np.isnan(expected).all()), name
        if name in found:
            print_ = fingerprint(name, found[name].numpy())
            np.testing.assert_allclose(print_[1:], expected[1:], rtol=1e-3, atol=1e-4 * norm, err_msg=name)
    optimiser.step()
    with torch.no_grad():
        after = float(model.losses(images, (1.0, 0.1))["loss"])
    assert after == pytest.approx(float(golden["step_loss_after"]), rel=1e-3)
    for name, expected in zip(names, golden["step_fp"], strict=True):
        if steady(name):
            tensor = parameters(model)[name].detach().numpy()
            np.testing.assert_allclose(fingerprint(name, tensor)[2], expected[2], rtol=1e-3, atol=1e-4, err_msg=name)
    model.resize(512, compat="published")
    tables = (model.encoder.pos_embed, model.decoder.pos_embed, model.decoder.mae_decoder.decoder_pos_embed)
    for name, table, expected in zip(("enc", "dec", "mae_dec"), tables, golden["pos512_fp"], strict=True):
        assert_prints(fingerprint(name, table.numpy()), expected, 1e-9)


def test_positions_and_patches_alone():
    golden = load("utils.npz")
    for dim, side, row in ((96, 4, True), (96, 6, False), (64, 4, True)):
        table = sincos_positions(dim, (side, side), class_row=row)[0].numpy()
        assert np.array_equal(table, golden[f"sincos_{dim}_{side}_{int(row)}"].astype(np.float32))
    for dim, side in ((768, 14), (512, 14), (1280, 16)):
        name = f"sincos_{dim}_{side}_1"
        table = sincos_positions(dim, (side, side), class_row=True)[0].numpy()
        assert_prints(fingerprint(name, table), golden[f"{name}_fp"], 1e-6)
    assert np.array_equal(patchify(torch.from_numpy(golden["patchify_in"]), 4).numpy(), golden["patchify_p4"])


def test_pixels_in_and_out():
    golden = load("utils.npz")
    small = load("tiny_forward_fan.npz")["x"]
    model = codec_model(*weights("tiny", "fan"), heads=4, decoder_heads=4, act=None, images=small)
    picture = torch.from_numpy(golden["rgb"]).permute(2, 0, 1)[None] / 255
    shown = model.normalise(picture)
    np.testing.assert_allclose(shown.numpy(), golden["load_image"], atol=1e-6)
    again = (model.denormalise(shown) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(again, golden["rgb"][None])
    assert np.abs(again.astype(int) - golden["decode_roundtrip"]).max() <= 1  # the published code truncates


def test_upscaler():
    from opsin.codec.upscaler import ConvUpscaler
    from opsin.errors import InvalidImage

    golden = load("utils.npz")
    listed = (str(entry).split(":", 1) for entry in golden["up_keys"])
    state = {key: torch.from_numpy(value(key, literal_eval(shape), "fan", 0)) for key, shape in listed}
    model = ConvUpscaler()
    model.load_state_dict(state)
    images = torch.from_numpy(golden["up_x"])
    with torch.no_grad():
        np.testing.assert_allclose(model(images).numpy(), golden["up_y"], atol=1e-5, rtol=0)
        assert ConvUpscaler((40, 30))(images).shape == (1, 3, 40, 30)
    with pytest.raises(InvalidImage):
        model(images[0])


def mae_weights(mode, dtype):
    """The golden weights of the reference MAE, drawn from its own key names."""
    found = {}
    for entry in load("mae_ref_tiny.npz")["keys"]:
        key, shape = str(entry).split(":", 1)
        found[key] = value(key, literal_eval(shape), mode, 4)
    return {key: torch.from_numpy(v.astype(DTYPES[dtype])) for key, v in found.items()}


def mae_model(mode, dtype):
    from opsin.codec import weights as reading

    images = load("tiny_forward_fan.npz")["x"].astype(DTYPES[dtype])
    model = codec_model(*weights("tiny", mode, dtype), heads=4, decoder_heads=4, act=None, images=images)
    enc, dec = reading.from_mae_state(mae_weights(mode, dtype))
    model.encoder.load_state_dict({**tensors(weights("tiny", mode, dtype)[0]), **enc})
    model.decoder.load_state_dict({**tensors(weights("tiny", mode, dtype)[1]), **dec})
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_all_tokens_are_those_of_mae(mode, dtype):
    """MAE's weights, its class token included, reconstruct as MAE without masks does."""
    model = mae_model(mode, dtype)
    images = draw("input/tiny", (2, 3, 64, 64)).numpy().astype(DTYPES[dtype])
    with torch.no_grad():
        found = model.decoder.full(model.encoder(torch.from_numpy(images)))
    expected = load("mae_ref_tiny.npz")[f"{mode}_r0_pred_{dtype}"]
    np.testing.assert_allclose(found.numpy(), expected, atol={"f32": 1e-5, "f64": 1e-13}[dtype], rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("ratio", [75, 50])
@pytest.mark.parametrize("mode", MODES)
def test_masked_training_of_mae(mode, ratio, norm_pix, dtype):
    """The blocks, tables, mask token and targets of the codec, put together as MAE trains, give MAE's numbers."""
    golden, prefix = load("mae_ref_tiny.npz"), f"{mode}_r{ratio}_np{int(norm_pix)}_{dtype}"
    model = mae_model(mode, dtype)
    encoder, decoder = model.encoder, model.decoder.mae_decoder
    images = draw("input/tiny", (2, 3, 64, 64)).to(model.encoder.cls_token.dtype)
    order = torch.from_numpy(golden["noise"]).argsort(1)
    back, keep = order.argsort(1), round(16 * (1 - ratio / 100))
    tokens = encoder._embed(images)
    kept = order[:, :keep, None].expand(-1, -1, 96)
    tokens = torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, kept)], 1)
    for block in encoder.mae_encoder.blocks:
        tokens = block(tokens)
    latent = encoder.mae_encoder.norm(tokens)
    inner = decoder.decoder_embed(latent)
    filled = torch.cat([inner[:, 1:], decoder.mask_token.expand(2, 16 - keep, -1)], 1)
    filled = filled.gather(1, back[..., None].expand(-1, -1, filled.shape[-1]))
    predicted = decoder(torch.cat([inner[:, :1], filled], 1) + decoder.decoder_pos_embed)[:, 1:]
    mask = (back >= keep).to(latent.dtype)
    target = patch_target(images, 16, norm_pix=norm_pix)
    loss = ((predicted - target).square().mean(-1) * mask).sum() / mask.sum()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    relative = {"f32": 3e-5, "f64": 1e-10}[dtype]
    assert np.array_equal(mask.numpy(), golden[f"{prefix}_mask"])
    assert loss.item() == pytest.approx(float(golden[f"{prefix}_loss"]), rel=relative)
    assert float(norm) == pytest.approx(float(golden[f"{prefix}_gradnorm"]), rel=relative)
    for name, tensor in (("pred", predicted), ("latent", latent), ("ids_restore", back)):
        if f"{prefix}_{name}" in golden:
            expected = golden[f"{prefix}_{name}"]
            np.testing.assert_allclose(tensor.detach().numpy(), expected, atol=relative, rtol=0, err_msg=name)


def test_loss_is_that_of_the_published_encoder():
    golden = load("tiny_forward_fan.npz")
    images, predicted = torch.from_numpy(golden["x"]), torch.from_numpy(golden["none_btnk_f32"])
    for norm_pix, at in ((False, 0), (True, 2)):
        found = float(reconstruction_loss(images, predicted, 16, norm_pix=norm_pix))
        assert found == pytest.approx(float(golden["none_losses_f32"][at]), rel=1e-6)
