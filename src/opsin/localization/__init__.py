"""Where was it last seen: a video and a picture of an object → a box track.

``query`` reads what is looked for, ``descriptors`` turns pictures into dense tokens, ``matching`` finds the object in
one picture, ``timeline`` chooses the moment, ``track`` follows it, ``model`` joins the stages, ``render`` draws it.
"""

from opsin.localization.model import locate, query_picture, save_track

__all__ = ["locate", "query_picture", "save_track"]
