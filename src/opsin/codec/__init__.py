"""One vector per image, and back: the bottleneck MAE codec (btnk_mae, of REMI, arXiv 2507.02064)."""

from opsin.codec.code import ImageCode
from opsin.codec.config import CodecConfig
from opsin.codec.decoder import CodecDecoder
from opsin.codec.encoder import CodecEncoder
from opsin.codec.model import Codec
from opsin.codec.patches import patchify, unpatchify

__all__ = ["Codec", "CodecConfig", "CodecDecoder", "CodecEncoder", "ImageCode", "patchify", "unpatchify"]
