"""What `distprop.hosts` runs on a host: it says what it finds there, tries the way to the other hosts, and cleans up.

It is sent over ssh as text, since distprop may be missing where it runs, so it needs nothing but Python's standard
library. It talks in lines of JSON: requests arrive on standard input, answers leave marked, because a login shell may
print lines of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import importlib
import json
import os
import platform
import shutil
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

MARK = "distprop-host "
CONNECT_SECONDS = 3.0  # to an address that does not answer
GREETING_SECONDS = 20.0  # from a process there, which may have to wait for a core or for its memory


def main() -> None:
    """Answer requests until standard input ends, which it also does when the launcher is killed."""
    reads_peers = may_read_other_processes()  # before there is a thread, since it forks
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen(512)
        token = os.urandom(8).hex()
        threading.Thread(target=_greet, args=(listener, token), daemon=True).start()
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "facts":
                found = facts(request["directory"], request["files"])
                found.update(reads_peers=reads_peers, port=listener.getsockname()[1], token=token)
                _answer(found)
            elif request["do"] == "connect":
                _answer(connect(request["peers"]))
            else:
                _answer({})
            if request["do"] == "guard":
                _guard(request["marker"], request["sign"], request["mirrored"], request["content"])


def facts(directory: str, files: list[str]) -> dict[str, Any]:
    """What has to be the same on all hosts, and what there is of cores, memory and interfaces."""
    found: dict[str, Any] = {"time": time.time(), "hostname": socket.gethostname(), "python": platform.python_version()}
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        found["machine"] = file.read().strip()  # containers of one machine share its cores
    found["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found["memory"] = free_memory()
    found["interfaces"] = interfaces()
    found["fabric"] = fabric()
    try:
        os.chdir(directory)
    except OSError as error:
        found["directory"] = error.strerror
        return found
    sys.path[0] = directory  # as under `python -m`
    found["files"] = {name: _sha256([name]) for name in files}
    found["software"] = software()
    return found


def software() -> dict[str, Any]:
    """The packages that compute and communicate, each with what identifies it, or why it cannot be used."""
    found: dict[str, str] = {}
    try:
        from distprop.comm import mpi

        folder = os.path.dirname(os.path.dirname(os.path.abspath(mpi.__file__)))
        sources = sorted(glob.glob(os.path.join(folder, "**", "*.py"), recursive=True))
        found["distprop"] = f"{sys.modules['distprop'].__version__} in {folder}"
        found["source of distprop"] = _sha256(sources, folder)[:12]
        for name in ("numpy", "mpi4py"):
            found[name] = importlib.import_module(name).__version__
        found["MPI"] = f"{mpi.library().name} from {mpi.library().path}"
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return found


def connect(peers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each peer, its addresses that answer with its own greeting from here; and why the others do not."""
    answers: list[dict[str, Any]] = [{"reached": [], "refused": []} for _ in peers]

    def knock(answer: dict[str, Any], address: str, port: int, token: str) -> None:
        try:
            with socket.create_connection((address, port), CONNECT_SECONDS) as connection:
                connection.settimeout(GREETING_SECONDS)
                greeting = connection.recv(64).decode()
            if greeting == token:
                answer["reached"].append(address)
            else:  # such as the address of Docker's bridge, which every host has
                answer["refused"].append(f"{address} is another host")
        except OSError as error:
            answer["refused"].append(f"{address}: {error.strerror or error}")

    threads = [
        threading.Thread(target=knock, args=(answer, address, peer["port"], peer["token"]))
        for answer, peer in zip(answers, peers)  # noqa: B905 - an old Python is to say so, not to fail here
        for address in peer["addresses"]
    ]
    for start in range(0, len(threads), 64):
        for thread in threads[start : start + 64]:
            thread.start()
        for thread in threads[start : start + 64]:
            thread.join()
    return answers


def interfaces() -> list[dict[str, Any]]:
    """The IPv4 interfaces that are up, except loopback, the fastest first: name, address, subnet, speed in Mbit/s."""
    import fcntl

    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:

        def ask(request: int, name: str) -> bytes:
            return fcntl.ioctl(any_socket.fileno(), request, struct.pack("256s", name.encode()))

        for _, name in socket.if_nameindex():
            try:
                flags = struct.unpack("H", ask(0x8913, name)[16:18])[0]  # SIOCGIFFLAGS
                address = ask(0x8915, name)[20:24]  # SIOCGIFADDR
                mask = ask(0x891B, name)[20:24]  # SIOCGIFNETMASK
            except OSError:  # it has no IPv4 address
                continue
            if not flags & 0x1 or flags & 0x8:  # IFF_UP, IFF_LOOPBACK
                continue
            network = bytes(a & m for a, m in zip(address, mask))  # noqa: B905 - as above
            subnet = f"{socket.inet_ntoa(network)}/{bin(int.from_bytes(mask, 'big')).count('1')}"
            speed = 0
            with contextlib.suppress(OSError, ValueError), open(f"/sys/class/net/{name}/speed") as file:
                speed = int(file.read())
            found.append({"name": name, "address": socket.inet_ntoa(address), "subnet": subnet, "speed": speed})
    return sorted(found, key=lambda interface: -interface["speed"])


def fabric() -> bool:
    """Whether this host has an InfiniBand or Omni-Path adapter."""
    return bool(glob.glob("/sys/class/infiniband/*"))


def bridges() -> list[str]:
    """The names of the interfaces that lead to containers and virtual machines of this host, such as docker0."""
    return sorted(path.split("/")[4] for path in glob.glob("/sys/class/net/*/bridge"))


def free_memory() -> int:
    """Bytes that new processes may take: what Linux calls available, or less in a control group with a limit."""
    free = []
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        free += [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")]
    for folder, limit, used in (("", "memory.max", "memory.current"), ("memory", *_CGROUP_1)):
        folder = f"/sys/fs/cgroup/{folder}"
        with (
            contextlib.suppress(OSError, ValueError),
            open(f"{folder}/{limit}") as most,
            open(f"{folder}/{used}") as now,
        ):
            free.append(int(most.read()) - int(now.read()))
    return min(free, default=0)


_CGROUP_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def may_read_other_processes() -> bool:
    """Whether one rank may copy from another's memory with process_vm_readv; containers often forbid it.

    MPI libraries use it for large messages within a host, and some fail, or complain, where it is refused.
    """
    if sys.platform != "linux":
        return False

    class Piece(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    here, there = ctypes.create_string_buffer(8), ctypes.create_string_buffer(b"a value")
    local = Piece(ctypes.cast(here, ctypes.c_void_p), 8)
    remote = Piece(ctypes.cast(there, ctypes.c_void_p), 8)
    libc = ctypes.CDLL(None)
    child = os.fork()
    if child == 0:
        libc.prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER_ANY, as the libraries do before it
        reader = os.fork()
        if reader == 0:
            read = libc.process_vm_readv(os.getppid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
            os._exit(0 if read == 8 else 1)
        os._exit(os.WEXITSTATUS(os.waitpid(reader, 0)[1]))
    return os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 0


def kill_marked(marker: str) -> None:
    """SIGKILL every process that has DISTPROP_JOB=`marker` in its environment, until there is none."""
    for _ in range(100):
        left = list(marked(marker))
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not left:
            return
        time.sleep(0.02)


def marked(marker: str) -> Iterator[int]:
    """The processes of the job, found where Linux shows the environment a process was started with."""
    wanted = f"DISTPROP_JOB={marker}".encode()
    for entry in glob.glob("/proc/[0-9]*"):
        with contextlib.suppress(OSError), open(f"{entry}/environ", "rb") as file:  # it ends, or is another user's
            if wanted in file.read().split(b"\0"):
                yield int(os.path.basename(entry))


def _sha256(names: list[str], folder: str = "") -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(os.path.relpath(name, folder or ".").encode() if folder else b"")
        try:
            with open(name, "rb") as file:
                digest.update(file.read())
        except OSError as error:
            return error.strerror or str(error)
    return digest.hexdigest()


def _guard(marker: str, sign: str, mirrored: str, content: str) -> None:
    """Until standard input ends: say when a rank here makes the file `sign`, or changes the file `mirrored`."""
    folder = os.path.dirname(mirrored)
    made = mirrored and not os.path.isdir(folder)
    if made:
        os.makedirs(folder)
    if content:
        with open(mirrored, "w") as file:
            file.write(content)
    ended = threading.Event()
    looking = threading.Thread(target=_look, args=(sign, mirrored, content, ended))
    looking.start()
    well = sys.stdin.read()
    if not well:
        kill_marked(marker)
    ended.set()
    looking.join()
    with contextlib.suppress(OSError):
        os.remove(sign)
    if made:
        shutil.rmtree(folder, ignore_errors=True)


def _look(sign: str, mirrored: str, content: str, ended: threading.Event) -> None:
    told = False
    while True:
        last = ended.wait(0.5)
        if not told and os.path.exists(sign):
            told = True
            _answer({"ending": True})
        with contextlib.suppress(OSError), open(mirrored or os.devnull) as file:
            before, content = content, file.read()
            if content != before:
                _answer({"mirrored": content})
        if last:
            return


def _greet(listener: socket.socket, token: str) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection = listener.accept()[0]
            with contextlib.suppress(OSError), connection:
                connection.sendall(token.encode())


def _answer(value: object) -> None:
    sys.stdout.write(f"{MARK}{json.dumps(value)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
