"""Where was it last seen?  python examples/locate.py VIDEO CROP [SHEET]"""

import sys

import opsin
from opsin.localization import render

video, crop = sys.argv[1:3]
track = opsin.locate(video, image=crop)
if track.found:
    print(f"last seen {track.times[0]:.2f}-{track.times[-1]:.2f} s, box on frame {track.frames[-1]}: {track.boxes[-1].tolist()}")
else:
    print(f"not found; the best score is {track.score:.2f}")
if len(sys.argv) > 3:
    print("drawn:", render.contact_sheet(video, track, sys.argv[3], query=opsin.read_image(crop)))
