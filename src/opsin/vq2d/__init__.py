"""Ego4D VQ2D, the benchmark of visual queries: annotations in, clips, predictions, ``metrics``, submission file out."""
