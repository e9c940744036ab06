"""Where was it last seen: a video, and a picture of an object or words for it → a box track.

``query`` reads what is looked for, ``engines`` joins a model and a way of finding (``template_finder`` is ours, that of
``opsin.vql`` the published one), ``search`` is a video opened for questions, ``model`` the door for a single one,
``render`` draws answers; ``recording`` makes a live source searchable.
"""

from opsin.localization.model import locate, query_picture, save_track
from opsin.localization.recording import recorded
from opsin.localization.search import VideoSearch

__all__ = ["VideoSearch", "locate", "query_picture", "recorded", "save_track"]
