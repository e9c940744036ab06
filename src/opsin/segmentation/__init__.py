"""Words to pixels, without training: an image is encoded once into a dense map in the space of words, every question
after that is a matrix product. RADSeg (SCRA in the last attention, windows, SCGA), RADSeg+ (SAM's decoder on top), on
RADIO, CLIP, SigLIP 2 and TIPSv2."""

from opsin.segmentation.aligned import AlignedBackbone
from opsin.segmentation.labels import Labels, as_labels
from opsin.segmentation.model import SegmentationFeatures, Segmenter
from opsin.segmentation.radseg import RADSegEncoder
from opsin.segmentation.result import Segmentation

__all__ = [
    "AlignedBackbone",
    "Labels",
    "RADSegEncoder",
    "Segmentation",
    "SegmentationFeatures",
    "Segmenter",
    "as_labels",
]
