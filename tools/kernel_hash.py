"""One hash of everything that is compiled: include/, cuda/, cpu/ and python/bindings/.

Results files carry it, so that a measurement can be told from one of other code. Used by CMake and
by bench/.
"""

import hashlib
from pathlib import Path

FOLDERS = ("include", "cuda", "cpu", "python/bindings")
SUFFIXES = (".h", ".cuh", ".cu", ".cpp")


def kernel_hash(root: Path) -> str:
    """First 12 hex digits of the SHA-256 over relative paths and contents of compiled sources.

    White space does not count: formatting leaves a measurement what it was.
    """
    digest = hashlib.sha256()
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                digest.update(path.relative_to(root).as_posix().encode())
                digest.update(b"".join(path.read_bytes().split()))
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    print(kernel_hash(Path(__file__).resolve().parent.parent))
