"""Photographs with regions: ``sources`` (label maps, mosaics, mask caches) and ``coco`` (its formats) read them as
``maps`` (disjoint masks share a label map); ``store`` is an append-only cache of masks. What region encoders train on.
"""
