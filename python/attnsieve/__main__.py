"""Command line: `python -m attnsieve demo | calibrate | doctor`."""

from __future__ import annotations

import sys

USAGE = """usage: python -m attnsieve COMMAND [options]

  demo       run a language model with sparse attention: density, perplexity, time (demo --help)
  calibrate  find which threshold skips which share of a model's tiles (calibrate --help), or
             SALE's threshold of every head (calibrate sale --help),
             FASA's frequencies of every head (calibrate fasa --help)
  doctor     what is installed, what each op runs on, and why something is unavailable
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; 2 for a wrong call."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] == "demo":
        from attnsieve.demo import main as demo

        return demo(arguments[1:])
    if arguments and arguments[0] == "calibrate":
        from attnsieve.calibrate import main as calibrate

        return calibrate(arguments[1:])
    if arguments == ["doctor"]:
        from attnsieve.doctor import main as doctor

        return doctor()
    if arguments and arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    print(USAGE, end="", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
