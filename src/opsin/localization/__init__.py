"""Where was it last seen: a video and a picture of an object → a box track.

``query`` reads what is looked for, ``descriptors`` turns pictures into dense tokens, ``matching`` finds the object in
one picture, ``timeline`` chooses the moment, ``track`` follows it, ``model`` joins the stages, ``render`` draws it;
``recording`` makes a live source searchable.
"""

from opsin.localization.model import locate, query_picture, save_track
from opsin.localization.recording import recorded

__all__ = ["locate", "query_picture", "recorded", "save_track"]
