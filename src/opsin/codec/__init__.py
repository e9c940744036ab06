"""One vector per image, and back: the bottleneck MAE codec (btnk_mae, of REMI, arXiv 2507.02064).

``Codec`` is the door, ``ImageCode`` what it gives; ``encoder`` and ``decoder`` are the networks, ``weights`` reads
published files and MAE starts, ``canvas`` lays images of any size, ``measures`` judges what came back.
"""

from opsin.codec.code import ImageCode
from opsin.codec.config import CodecConfig
from opsin.codec.decoder import CodecDecoder
from opsin.codec.encoder import CodecEncoder
from opsin.codec.model import Codec
from opsin.codec.patches import patchify, unpatchify

__all__ = ["Codec", "CodecConfig", "CodecDecoder", "CodecEncoder", "ImageCode", "patchify", "unpatchify"]
