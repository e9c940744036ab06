"""An object in one picture, and through the pictures of a video.

``base`` says what a tracker and a maker of masks are; ``sam2`` and ``sam2_video`` are SAM 2; ``descriptors``,
``matching`` and ``follow`` do it with the tokens of a region model, without further weights.
"""
