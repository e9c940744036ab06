"""An object in one picture, and through the pictures of a video.

``base`` says what a tracker and a maker of masks are; ``sam2`` and ``sam2_video`` are SAM 2; ``template`` does it with
the tokens of a region model, without further weights, by ``descriptors``, ``matching`` and ``follow``; ``masks`` holds
small tools.
"""
