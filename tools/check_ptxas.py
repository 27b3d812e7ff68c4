"""Runs a CUDA compile command and fails where ptxas serialised wgmma (C7510 to C7519).

ptxas reports a serialised warpgroup MMA as information, not as a warning, so --warning-as-error
lets it pass; the kernel would be correct and several times slower.
"""

import re
import subprocess
import sys

SERIALISED = re.compile(r"\(C751\d\)")


def main() -> int:
    process = subprocess.run(
        sys.argv[1:], stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
    )
    sys.stdout.write(process.stdout)
    if process.returncode == 0 and SERIALISED.search(process.stdout):
        sys.stdout.write("error: wgmma was serialised, see C751x above\n")
        return 1
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
