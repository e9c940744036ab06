"""Where was it last seen?  python examples/locate.py VIDEO CROP [SHEET]"""

import sys

import opsin
from opsin.localization import render

video, crop = sys.argv[1:3]
track = opsin.locate(video, image=crop)
if track.found:
    span = f"{track.times[0]:.2f} s to {track.times[-1]:.2f} s"
    print(f"last seen from {span}, at the end in {track.boxes[-1].tolist()}")
else:
    print(f"not found; the best score is {track.score:.2f}")
if len(sys.argv) > 3:
    print("drawn:", render.contact_sheet(video, track, sys.argv[3], query=opsin.read_image(crop)))
