"""Checks a built wheel: exactly the files it should hold, portable libraries, the right GPU code.

Usage: python tools/check_wheel.py WHEEL [--cuda]

With --cuda the library must hold the architectures of a full CUDA build. Needs binutils (readelf,
nm), which come with gcc. Exit code 1 and one line per problem where something is wrong.
"""

from __future__ import annotations

import argparse
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 40 * 2**20
LIBRARY = "attnsieve/libattnsieve.so"
INFO_MODULE = re.compile(r"attnsieve/_C\.[\w-]+\.so")
METADATA = {
    "METADATA",
    "RECORD",
    "WHEEL",
    "entry_points.txt",
    "licenses/LICENSE",
    "licenses/THIRD_PARTY_NOTICES.md",
}
SYSTEM_LIBRARIES = re.compile(
    r"(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|ld-linux[\w-]*)\.so\.\d+"
)
STREAM_GETTER = "aoti_torch_get_current_cuda_stream"  # absent from CPU builds of torch

# Container and entry headers of nvcc's fat binaries, little endian.
FATBIN_MAGIC = 0xBA55ED50
FATBIN_HEADER = struct.Struct("<IHHQ")  # magic, version, header bytes, bytes of all entries
ENTRY_HEADER = struct.Struct("<HHIQ")  # kind, version, header bytes, payload bytes
ENTRY_ARCH_OFFSET = 0x1C  # uint32: 80, 90 ...
ENTRY_FLAGS_OFFSET = 0x28  # uint64
ARCH_SPECIFIC_FLAG = 0x100000  # the "a" of sm_90a
KINDS = {1: "compute_{} PTX", 2: "sm_{} ELF"}
CUDA_ARCHS = {"compute_80 PTX", "sm_80 ELF", "sm_90a ELF"}


def expected_files() -> set[str]:
    """Every file of the Python package in this tree."""
    package = ROOT / "python" / "attnsieve"
    return {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.name == "py.typed" or path.suffix == ".py"
    }


def content_problems(wheel: Path, names: set[str]) -> list[str]:
    """Files that are missing, and files that do not belong into a wheel."""
    version = re.match(r"attnsieve-([^-]+)-", wheel.name)
    if version is None:
        return [f"{wheel.name}: not a wheel of attnsieve"]
    metadata = {f"attnsieve-{version[1]}.dist-info/{name}" for name in METADATA}
    wanted = expected_files() | metadata | {LIBRARY}
    problems = [f"missing: {name}" for name in sorted(wanted - names)]
    rest = sorted(names - wanted)
    modules = [name for name in rest if INFO_MODULE.fullmatch(name)]
    if len(modules) != 1:
        problems.append(f"expected one _C module, found {modules}")
    problems += [f"does not belong here: {name}" for name in rest if name not in modules]
    size = wheel.stat().st_size
    if size > MAX_BYTES:
        problems.append(f"{size / 2**20:.1f} MB, more than {MAX_BYTES // 2**20} MB")
    return problems


def tool(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def library_problems(path: Path, name: str) -> list[str]:
    """Dependencies, search paths and the stream getter of one shared library."""
    problems = []
    own = {"libtorch.so"} if name == LIBRARY else {"libattnsieve.so"}
    dynamic = tool("readelf", "-d", "-W", path)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    for library in sorted(own - needed):
        problems.append(f"{name} does not need {library}")
    for library in sorted(needed - own):
        if not SYSTEM_LIBRARIES.fullmatch(library):
            problems.append(f"{name} needs {library}")
    for folders in re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", dynamic):
        if folders != "$ORIGIN":
            problems.append(f"{name} searches {folders}, not $ORIGIN alone")
    for line in tool("nm", "-D", path).splitlines():
        fields = line.split()
        if fields[-1] == STREAM_GETTER and fields[-2] != "w":
            problems.append(f"{name}: {STREAM_GETTER} is '{fields[-2]}', not weak")
    return problems


def embedded_archs(path: Path) -> set[str]:
    """What the fat binaries of a library hold, as "sm_80 ELF", "compute_80 PTX" ..."""
    section = re.search(
        r"\.nv_fatbin\s+PROGBITS\s+[0-9a-f]+\s+([0-9a-f]+)\s+([0-9a-f]+)",
        tool("readelf", "-S", "-W", path),
    )
    if section is None:
        return set()
    begin, length = (int(text, 16) for text in section.groups())
    data = path.read_bytes()[begin : begin + length]
    archs = set()
    position = data.find(struct.pack("<I", FATBIN_MAGIC))
    while position >= 0:
        _, _, header, size = FATBIN_HEADER.unpack_from(data, position)
        entry, end = position + header, position + header + size
        while entry < end:
            kind, _, header, payload = ENTRY_HEADER.unpack_from(data, entry)
            (arch,) = struct.unpack_from("<I", data, entry + ENTRY_ARCH_OFFSET)
            (flags,) = struct.unpack_from("<Q", data, entry + ENTRY_FLAGS_OFFSET)
            suffix = "a" if flags & ARCH_SPECIFIC_FLAG else ""
            archs.add(KINDS.get(kind, f"kind {kind} of {{}}").format(f"{arch}{suffix}"))
            entry += header + payload
        position = data.find(struct.pack("<I", FATBIN_MAGIC), end)
    return archs


def cuda_problems(path: Path) -> list[str]:
    """What a full CUDA build must hold beyond a CPU build."""
    problems = []
    archs = embedded_archs(path)
    if archs != CUDA_ARCHS:
        problems.append(f"GPU code for {sorted(archs)}, expected {sorted(CUDA_ARCHS)}")
    if STREAM_GETTER not in tool("nm", "-D", path):
        problems.append(f"{LIBRARY} does not refer to {STREAM_GETTER}")
    return problems


def main() -> int:
    """Prints every problem; returns 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--cuda", action="store_true", help="a full CUDA build is expected")
    options = parser.parse_args()
    with zipfile.ZipFile(options.wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        problems = content_problems(options.wheel, names)
        for name in sorted(names):
            if name.endswith(".so"):
                path = Path(archive.extract(name, folder))
                problems += library_problems(path, name)
                if options.cuda and name == LIBRARY:
                    problems += cuda_problems(path)
    for problem in problems:
        print(f"{options.wheel.name}: {problem}", file=sys.stderr)
    if not problems:
        size = options.wheel.stat().st_size / 2**20
        print(f"{options.wheel.name}: {len(names)} files, {size:.1f} MB, all checks passed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
