"""The features of a backbone, compiled by OpenVINO for images of one size: faster on CPUs, optional.

``Segmenter.from_pretrained("radseg-b", runtime="openvino")`` does its windows so. Needs the extra ``openvino``.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from opsin.backbones.base import Backbone
from opsin.errors import IncompatibleModel, InvalidConfig, MissingExtra
from opsin.geometry import Size
from opsin.runtime import generator, resolve_dtype

# Largest difference from the features of torch, by length: rounding of float32; that of bfloat16 through all blocks.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


class CompiledFeatures:
    """``backbone(pixels).features`` of one size; other sizes are left to the backbone itself.

    ``error`` is the relative difference from torch that was measured at the start. The graph is that of the backbone
    when it was compiled: what changes later (its attention, its weights) is not seen.
    """

    def __init__(self, backbone: Backbone, size: Size, compiled: Any) -> None:
        import openvino

        self.backbone, self.size = backbone, size
        self._queue = openvino.AsyncInferQueue(compiled, compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._queue.set_callback(_keep)
        self.error = 0.0

    def __call__(self, pixels: Tensor) -> Tensor:
        """``(B, 3, H, W)`` RGB in [0, 1] to ``(B, D, h, w)`` float32; the images of a batch run side by side."""
        if tuple(pixels.shape[1:]) != (3, *self.size):
            return self.backbone(pixels).features
        found: list[Any] = [None] * len(pixels)
        for index, image in enumerate(pixels.float().contiguous().numpy()):
            self._queue.start_async({0: image[None]}, (found, index))
        self._queue.wait_all()
        return torch.from_numpy(found[0]) if len(found) == 1 else torch.cat([torch.from_numpy(f) for f in found])


def compile_features(
    backbone: Backbone, size: int | Size, *, dtype: str | torch.dtype | None = None, tolerance: float | None = None
) -> CompiledFeatures:
    """Compile the features of a backbone as it is now, for images of one size, and check them against torch.

    Takes some seconds and the memory of a second copy of the weights.

    Args:
        backbone: on the CPU, in float32; with SCRA where that is installed in its last block.
        size: side or ``(H, W)`` of the images, multiples of the patch.
        dtype: of the computation: float32 (default), bfloat16, or ``"auto"``: bfloat16 where the CPU has it.
        tolerance: largest relative difference ‖OpenVINO - torch‖ / ‖torch‖ of the features of a random image;
            by default 10⁻⁴ in float32 and 3·10⁻² in bfloat16.

    Raises:
        MissingExtra: OpenVINO is not installed.  InvalidConfig: another device or dtype.
        UnsupportedSize: no multiples of the patch.  IncompatibleModel: OpenVINO gives other features than torch.
    """
    weight = next(backbone.parameters())
    precision = check(weight.device, dtype)
    if weight.dtype != torch.float32:
        raise InvalidConfig("OpenVINO compiles a backbone whose weights are float32", got=weight.dtype)
    import openvino

    height, width = (size, size) if isinstance(size, int) else size
    example = torch.rand((1, 3, height, width), generator=generator(0))
    with torch.no_grad():
        expected = backbone(example).features
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, about its own graph
            graph = torch.export.export(_Features(backbone).eval(), (example,), strict=False)
            network = openvino.convert_model(graph)
    del graph
    threads = torch.get_num_threads()
    options = {
        "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
        "PERFORMANCE_HINT": "THROUGHPUT",  # one image per thread: nothing waits
        "NUM_STREAMS": threads,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
    }
    found = CompiledFeatures(backbone, (height, width), openvino.Core().compile_model(network, "CPU", options))
    found.error = float((found(example) - expected).norm() / expected.norm())
    limit = TOLERANCES[precision] if tolerance is None else tolerance
    if not found.error <= limit:
        raise IncompatibleModel(
            f"OpenVINO gives the features of torch to {limit:g}", got=f"a relative difference of {found.error:.2g}",
            remedy='Use dtype="float32", or a larger tolerance, or torch.',
        )
    return found


def check(device: torch.device, dtype: str | torch.dtype | None = None) -> torch.dtype:
    """The dtype that OpenVINO is to compute in, before anything is loaded for it.

    Raises:
        MissingExtra: OpenVINO is not installed.  InvalidConfig: not the CPU, or not float32, bfloat16 or ``"auto"``.
    """
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise MissingExtra.of("openvino", "openvino", "compile a backbone") from error
    if device.type != "cpu":
        raise InvalidConfig(
            "OpenVINO computes on the CPU", got=str(device), remedy='Say device="cpu", or leave runtime out.'
        )
    precision = resolve_dtype(dtype, device)
    if precision not in _PRECISIONS:
        raise InvalidConfig("OpenVINO computes in float32 or bfloat16", got=precision)
    return precision


class _Features(nn.Module):
    """What is exported."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels: Tensor) -> Tensor:
        return self.backbone(pixels).features


def _keep(request: Any, place: tuple[list[Any], int]) -> None:
    """Copy a result: the next image overwrites it."""
    found, index = place
    found[index] = request.get_output_tensor(0).data.copy()
