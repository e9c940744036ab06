"""``opsin VERB ...``: one verb per job. A verb's module is imported only when the verb is used."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from opsin.errors import OpsinError, near_misses

VERBS = {  # module, or module:object, with HELP, EXAMPLE, add_arguments and run
    "models": "opsin.cli.models",
    "doctor": "opsin.cli.doctor",
    "regions": "opsin.cli.regions",
    "segment": "opsin.cli.segment",
    "encode": "opsin.cli.codes:ENCODE",
    "decode": "opsin.cli.codes:DECODE",
    "locate": "opsin.cli.locate",
    "train": "opsin.cli.train",
    "eval": "opsin.cli.eval",
    "demo": "opsin.cli.demo",
}
SUMMARIES = {  # so that `opsin -h` imports no verb
    "models": "list the models: sizes, licences, what is in the cache",
    "doctor": "versions, devices, extras, cache; fails when something installed is broken",
    "regions": "find and draw the regions of images",
    "segment": "label every pixel of images by words",
    "encode": "one vector per image",
    "decode": "images again from their vectors",
    "locate": "find where an object was last seen in a video",
    "train": "train a region encoder on a frozen backbone, or a codec",
    "eval": "measure the quality of a model on annotated data",
    "demo": "make a small video from photographs and find an object in it",
}
INTERRUPTED = 130
FAILED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status.

    0; 1 where files of several were skipped; 2 for an error that the message explains; 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(overview())
        return 0 if words else FAILED
    if words[0] in ("-V", "--version"):
        from opsin import __version__

        sys.stdout.write(f"opsin {__version__}\n")
        return 0
    verb = words[0]
    if verb not in VERBS:
        hint = near_misses(verb, VERBS) or f"The verbs are {', '.join(VERBS)}."
        sys.stderr.write(f'opsin: no verb "{verb}". {hint}\n')
        return FAILED
    # Threads that spin while they wait slow each other down up to tenfold on a machine that does other work too. It has
    # to be said before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        name, _, part = VERBS[verb].partition(":")
        module = importlib.import_module(name)
        found = getattr(module, part) if part else module
        return int(found.run(parser_of(verb, found).parse_args(words[1:])))
    except OpsinError as error:
        sys.stderr.write(f"opsin {verb}: {type(error).__name__}: {error}\n")
        return FAILED
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:  # `opsin ... | head`
        sys.stderr.close()
        return 0


def parser_of(verb: str, found: Any) -> argparse.ArgumentParser:
    """The parser of one verb, which ``found`` implements; its help ends with an example that runs."""
    epilog = f"example:\n  {found.EXAMPLE}" if hasattr(found, "EXAMPLE") else None
    parser = argparse.ArgumentParser(
        f"opsin {verb}", description=found.HELP, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_arguments(parser)
    return parser


def overview() -> str:
    """What ``opsin -h`` prints."""
    rows = "\n".join(f"  {verb:9}{summary}" for verb, summary in SUMMARIES.items())
    return f"usage: opsin VERB [options]\n\n{rows}\n\nopsin VERB -h explains one verb, with an example.\n"


if __name__ == "__main__":
    sys.exit(main())
