"""Faster on CPUs, and still right: matrix products by oneDNN, bfloat16 with a float32 residual, OpenVINO."""

from __future__ import annotations

import copy
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from opsin.backbones import from_config, half
from opsin.cli.main import main
from opsin.errors import IncompatibleModel, InvalidConfig, MissingExtra, UnsupportedSize
from opsin.runtime import fast_matmul
from opsin.segmentation import Segmenter
from opsin.segmentation.attention import SelfCorrelatingAttention
from tests.conformance.test_radio import checkpoint


def radio(dtype: torch.dtype = torch.float32, scra: bool = True):
    """A small RADIO, with SCRA in its last block."""
    from transformers import RadioConfig

    torch.manual_seed(0)
    config = RadioConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, patch_size=16, max_img_size=256, num_cls_tokens=2,
        num_registers=2, initializer_range=0.1,
    )  # fmt: skip
    backbone = from_config(config)
    for name, parameter in backbone.named_parameters():
        if "bias" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    block = backbone.model.encoder.layer[-1]
    block.attention = SelfCorrelatingAttention(block.attention, 10.0) if scra else block.attention
    return backbone.to(dtype)


@pytest.fixture(scope="module")
def backbone():
    return radio()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.rand((3, 3, 96, 96), generator=torch.Generator().manual_seed(1))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


# --- fast_matmul ------------------------------------------------------------------------------------------------------


def test_fast_matmul_puts_the_setting_back_even_after_an_error() -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(ZeroDivisionError), fast_matmul():
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "highest"


def test_fast_matmul_in_two_threads_ends_with_the_last() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with fast_matmul():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with fast_matmul():
        within = torch.get_float32_matmul_precision()
        thread.start()
        assert inside.wait(10)
    assert torch.get_float32_matmul_precision() == within  # the other thread is still inside
    leave.set()
    thread.join()
    assert torch.get_float32_matmul_precision() == "highest"


def test_fast_matmul_leaves_the_precision_that_the_caller_chose() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with fast_matmul():
            assert torch.get_float32_matmul_precision() == "high"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_fast_matmul_is_exact_to_float32() -> None:
    draw = torch.Generator().manual_seed(2)
    a, b = torch.randn((300, 3072), generator=draw), torch.randn((3072, 200), generator=draw)
    exact = a.double() @ b.double()
    plain = ((a @ b).double() - exact).norm() / exact.norm()
    with fast_matmul():
        fast = ((a @ b).double() - exact).norm() / exact.norm()
    assert fast < max(3 * plain, 2e-6)


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "heads"), [(1, 1), (9, 3), (300, 5), (1500, 2)])
def test_attention_in_blocks(count: int, heads: int) -> None:
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn((2, heads, count, 16), generator=draw, dtype=torch.float64) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(half.attend(q, k, v, 0.25), expected)
    rounded = half.attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.25)
    assert relative(rounded, expected) < 1e-2


def test_tuned_bfloat16_is_nearer_to_float32(backbone, pixels) -> None:
    with torch.no_grad():
        expected = backbone(pixels).features
        plain = backbone_half = radio(torch.bfloat16)
        before = relative(plain(pixels).features, expected)
        half.tune(backbone_half)
        found = backbone_half(pixels).features
        assert found.dtype == torch.bfloat16
        assert relative(found, expected) < before
        half.tune(backbone_half)  # again changes nothing
        torch.testing.assert_close(backbone_half(pixels).features, found, atol=0, rtol=0)
        back = copy.deepcopy(backbone_half).float()  # whoever wants float32 again gets it
        assert back(pixels).features.dtype == torch.float32


def test_tuning_leaves_float32_alone(pixels) -> None:
    one = radio()
    with torch.no_grad():
        before = one(pixels).features
        half.tune(one)
        torch.testing.assert_close(one(pixels).features, before, atol=0, rtol=0)
    assert not any(isinstance(m, half.RoundedNorm) for m in one.modules())


def test_tuned_attention_still_trains() -> None:
    """With gradients the usual attention is taken."""
    one = radio(torch.bfloat16, scra=False)  # it has no gradient
    half.tune(one)
    pixels = torch.rand(1, 3, 64, 64, requires_grad=True)
    one.model.requires_grad_(True)
    one(pixels).features.float().sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0


# --- OpenVINO ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openvino():
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    from opsin.backbones import openvino

    return openvino


def test_openvino_gives_the_features_of_torch(openvino, backbone, pixels) -> None:
    compiled = openvino.compile_features(backbone, 96)
    assert compiled.error < 1e-4
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixels), backbone(pixels).features, atol=1e-3, rtol=1e-3)
        one = compiled(pixels[1:2]).clone()
        compiled(pixels[:1])  # a later result does not overwrite an earlier one
        torch.testing.assert_close(one, compiled(pixels)[1:2], atol=1e-5, rtol=1e-5)
        other = torch.rand(1, 3, 64, 80)
        torch.testing.assert_close(compiled(other), backbone(other).features, atol=0, rtol=0)


def test_openvino_in_bfloat16_states_its_error(openvino, backbone, pixels) -> None:
    compiled = openvino.compile_features(backbone, (96, 96), dtype="bfloat16")
    with torch.no_grad():
        assert relative(compiled(pixels), backbone(pixels).features) < 5e-2
    assert compiled.error < openvino.TOLERANCES[torch.bfloat16]


def test_openvino_refuses_what_it_cannot_do(openvino, backbone) -> None:
    with pytest.raises(IncompatibleModel, match="relative difference"):
        openvino.compile_features(backbone, 96, dtype="bfloat16", tolerance=1e-9)
    with pytest.raises(InvalidConfig, match="float32 or bfloat16"):
        openvino.compile_features(backbone, 96, dtype="float16")
    with pytest.raises(InvalidConfig, match="weights are float32"):
        openvino.compile_features(radio(torch.bfloat16), 96)
    with pytest.raises(UnsupportedSize):
        openvino.compile_features(backbone, 100)


def tiny_checkpoint(folder: Path) -> Path:
    """RADIO in the published layout: any reference that a segmenter takes."""
    return checkpoint(folder / "c-radio_tiny_half.pth.tar")


def test_a_segmenter_on_openvino_gives_what_torch_gives(openvino, tmp_path, monkeypatch) -> None:
    path, side = tiny_checkpoint(tmp_path), 48
    options = {"crop": side, "stride": 32}
    images = [torch.rand((3, h, w), generator=torch.Generator().manual_seed(h)) for h, w in ((100, 150), (48, 80))]
    plain = Segmenter.from_pretrained(path, device="cpu")
    fast = Segmenter.from_pretrained(path, runtime="openvino")
    made = []
    compile_features = openvino.compile_features
    monkeypatch.setattr(openvino, "compile_features", lambda *a, **k: made.append(a[1:]) or compile_features(*a, **k))
    for expected, found in zip(plain.encode(images, **options), fast.encode(images, **options), strict=True):
        torch.testing.assert_close(found.features, expected.features, atol=1e-3, rtol=1e-3)
    assert made == [(side,)]
    assert (fast.runtime, plain.runtime) == ("openvino", "torch")
    plain.aligned.scra = fast.aligned.scra = 3.0  # the graph is made anew, or it would show the old attention
    a, b = (one.encode(images[0], **options)[0].features for one in (fast, plain))
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    assert len(made) == 2
    with pytest.raises(InvalidConfig, match="windows of one size"):
        fast.encode(images, crop=0)
    half_way = Segmenter.from_pretrained(path, runtime="openvino", dtype="bfloat16")
    assert next(half_way.aligned.parameters()).dtype == torch.float32
    rounded = half_way.encode(images[0], **options)[0].features
    plain.aligned.scra = half_way.aligned.scra
    assert relative(rounded, plain.encode(images[0], **options)[0].features) < 5e-2


def test_openvino_is_refused_before_anything_is_loaded(tmp_path, monkeypatch) -> None:
    path = tmp_path / "none.pth.tar"
    with pytest.raises(InvalidConfig, match="runtime is"):
        Segmenter.from_pretrained(path, runtime="onnx")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtra, match=r"opsin\[openvino\]"):
        Segmenter.from_pretrained(path, runtime="openvino")
    monkeypatch.setitem(sys.modules, "openvino", ModuleType("openvino"))
    with pytest.raises(InvalidConfig, match="on the CPU"):
        Segmenter.from_pretrained(path, runtime="openvino", device="meta")
    with pytest.raises(InvalidConfig, match="float32 or bfloat16"):
        Segmenter.from_pretrained(path, runtime="openvino", dtype="float16")


def test_the_command_takes_openvino(tmp_path, monkeypatch) -> None:
    asked = []

    def never(ref, **options):
        asked.append(options)
        raise InvalidConfig("stop")

    monkeypatch.setattr(Segmenter, "from_pretrained", never)
    photo = tmp_path / "photo.png"
    Image.new("RGB", (32, 32)).save(photo)
    assert main(["segment", str(photo), "cat, sofa", "--runtime", "openvino", "--dtype", "bfloat16"]) == 2
    assert main(["segment", str(photo), "cat, sofa"]) == 2
    assert [options["runtime"] for options in asked] == ["openvino", "torch"]
    assert asked[0]["dtype"] == "bfloat16"
