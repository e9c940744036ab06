"""Film photographs with a virtual camera and find the cup of one of them: python examples/demo.py [FOLDER]"""

import sys

from opsin.cli.main import main

sys.exit(main(["demo", *(["--out", sys.argv[1]] if len(sys.argv) > 1 else [])]))
