"""Objects from tokens: point prompts on a frozen backbone's features become a few region tokens per image.

``RegionModel`` is the door; ``RegionEncoder`` the network; ``aggregate`` the grouping; ``TransferModel`` takes the
regions of one model and the tokens of another.
"""

from opsin.regions.aggregate import Groups, group
from opsin.regions.checkpoint import convert_published
from opsin.regions.encoder import RegionEncoder, RegionMemory, RegionOutput
from opsin.regions.model import RegionModel
from opsin.regions.transfer import TransferModel

__all__ = [
    "Groups",
    "RegionEncoder",
    "RegionMemory",
    "RegionModel",
    "RegionOutput",
    "TransferModel",
    "convert_published",
    "group",
]
