"""Measuring: every measure is a pure function with an accumulator, every report says where and with what it was made.

``retrieval`` (segments of COCO), ``grouping`` (human segmentations), ``localization`` (visual queries),
``segmentation`` with ``segmentation_data`` and ``protocols`` (labels by words), and ``linear_probe``; ``datasets``
reads. Submodules are imported by name.
"""
