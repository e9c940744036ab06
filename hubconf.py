"""``torch.hub`` entries. ``torch.hub.load(<this repository>, "radseg_encoder", model_version="c-radio_v3-b")``."""

import sys
from pathlib import Path

dependencies = ["torch", "transformers", "safetensors", "huggingface_hub", "numpy", "PIL", "scipy"]

_SOURCE = Path(__file__).parent / "src"
if _SOURCE.is_dir() and str(_SOURCE) not in sys.path:
    sys.path.insert(0, str(_SOURCE))


def radseg_encoder(model_version="c-radio_v3-b", lang_model="siglip2", **kwargs):
    """RADSeg under the names of its own release: see ``opsin.segmentation.radseg.RADSegEncoder``."""
    from opsin.segmentation.radseg import radseg_encoder as make

    return make(model_version, lang_model, **kwargs)
