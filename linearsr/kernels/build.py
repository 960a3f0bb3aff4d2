"""Compiles the kernels for the machine it runs on; not imported before somebody wants them, as it is of no use but on Unix."""

import fcntl
import hashlib
import os
import stat
import subprocess
import tempfile
from pathlib import Path
from uuid import uuid4

from linearsr.kernels.library import Kernels, KernelsError

SOURCES = ("gated_depthwise.cpp", "relu_attention.cpp", "luminance_psnr.cpp")
HEADER = "vector.hpp"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-pthread")


def kernels_folder() -> Path:
    """Return this user's folder on this machine for compiled kernels, made if it is not there.

    Raises:
        KernelsError: if others could write into it: what is in there is executed.
    """
    folder = Path(tempfile.gettempdir()) / f"linearsr-kernels-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
    except OSError as error:
        raise KernelsError(f"{folder}: got {error.strerror}; expected a folder for compiled kernels; fix: set TMPDIR to one") from error
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise KernelsError(f"{folder}: got a place that others may write to; expected a folder of this user alone; fix: remove it")
    return folder


def build_kernels(folder: Path | None = None, *, compiler: str = "c++") -> Kernels:
    """Compile the kernels for this machine, unless that was done before; some seconds, in which other processes that ask wait.

    Args:
        folder: Where libraries are kept; `kernels_folder()` if left out.
        compiler: GCC, by name or path; Clang may do, but was not tried.

    Raises:
        KernelsError: if there is no such compiler, or it fails.
    """
    folder = folder or kernels_folder()
    sources = Path(__file__).parent
    texts = [(sources / name).read_bytes() for name in (HEADER, *SOURCES)]
    # What the compiler defines by itself names its version and all instructions that `native` stands for.
    defined = _run([compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    name = hashlib.sha256(b"\0".join([*texts, " ".join(FLAGS).encode(), defined])).hexdigest()[:24]
    path = folder / f"linearsr-{name}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            temporary = folder / f"{path.name}.part-{uuid4().hex}"
            try:
                _run([compiler, *FLAGS, "-shared", "-o", str(temporary), *(str(sources / source) for source in SOURCES)])
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
    return Kernels(path)


def _run(command: list[str]) -> bytes:
    fix = "install g++, or leave compiled kernels off"
    try:
        done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 (a compiler, and our own arguments)
    except OSError as error:
        raise KernelsError(f"compiled kernels: got no C++ compiler {command[0]!r} ({error.strerror}); expected one; fix: {fix}") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-800:]
        raise KernelsError(f"compiled kernels: got exit status {done.returncode} from {command[0]!r}; expected 0; fix: {fix}\n{said}")
    return done.stdout
