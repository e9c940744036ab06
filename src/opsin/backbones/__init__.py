"""Frozen image encoders of ``transformers`` behind one face: pixels in [0, 1] → patch features.

``load`` takes a catalogue name, ``hf:`` or ``dir:`` reference; ``from_config`` makes an untrained one.
"""

from opsin.backbones.base import Backbone, BackboneOutput
from opsin.backbones.loading import families, from_config, load

__all__ = ["Backbone", "BackboneOutput", "families", "from_config", "load"]
