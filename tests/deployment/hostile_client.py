"""What code that a hostile coordinator ships would look for beside the relay, with the relay's own rights.

``look()`` gathers everything that can be read, asks every socket, and tries to write and to rise. It runs in the
SuperNode's container, shipped by Flower; and once in the trainer's, where it must find what it is looking for.
Standard library and gRPC only: the file travels as text.
"""

import base64
import ctypes
import json
import os
import socket
import stat
import time

SYSTEM = ("/bin", "/dev", "/lib", "/lib64", "/opt/cloister/bin", "/opt/cloister/lib", "/proc", "/sbin", "/sys", "/usr")
"""What every image of this kind holds: programs, and the kernel's own view."""
LARGEST, ALTOGETHER = 4 << 20, 24 << 20
TRAINER = "/run/cloister/trainer.sock"
METHODS = [
    *(f"cloister.v1.Trainer/{name}" for name in ("Describe", "Train", "SignedList", "SignedPart")),
    *(f"cloister.v1.Trainer/{name}" for name in ("Status", "Progress", "Budget", "Read", "Records", "Ledger")),
    "grpc.health.v1.Health/Check",
    "grpc.health.v1.Health/List",
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "grpc.channelz.v1.Channelz/GetServers",
]
BODIES = (b"", b"\x0a\x00", b"\x0a\x02{}", b"\x0a\x0b/data/" + b"x" * 5, bytes(range(64)))
PLACES = ("/x", "/data/x", "/state/x", "/etc/x", "/opt/cloister/x", "/etc/cloister/kit/x", "/run/cloister/x")


def everything():
    """Path and kind of all that lies outside of ``SYSTEM``, as far as folders can be listed."""
    for folder, folders, names in os.walk("/"):
        folders[:] = [name for name in folders if os.path.join(folder, name) not in SYSTEM]
        for name in names:
            path = os.path.join(folder, name)
            try:
                yield path, os.lstat(path).st_mode
            except OSError:
                continue


def files():
    """Path to content, in base64, of every file that can be read; and what every process lets others read of itself."""
    paths = [path for path, mode in everything() if stat.S_ISREG(mode)]
    for process in filter(str.isdigit, os.listdir("/proc")):
        paths += [f"/proc/{process}/{name}" for name in ("cmdline", "environ")]
        for hidden in ("data/records.jsonl", "state/ledger.sqlite", "etc/cloister/client.key", "state/status.sock"):
            paths.append(os.path.join("/proc", process, "root", hidden))  # another process's file tree
        try:
            paths += [f"/proc/{process}/fd/{number}" for number in os.listdir(f"/proc/{process}/fd")]
        except OSError:
            continue
    found, size = {}, 0
    for path in paths:
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                continue
            with open(path, "rb") as file:
                content = file.read(LARGEST)
        except OSError:
            continue
        size += len(content)
        if content and size < ALTOGETHER:
            found[path] = base64.b64encode(content).decode()
    return found


def sockets():
    """Name to the first bytes that it says, in base64, of every Unix socket: in a folder, in the kernel's list."""
    names = {path for path, mode in everything() if stat.S_ISSOCK(mode)} | {"/state/status.sock"}
    with open("/proc/net/unix") as lines:
        names |= {fields[7] for fields in map(str.split, lines) if len(fields) > 7 and fields[7] != "Path"}
    said = {}
    for name in names:
        try:
            with socket.socket(socket.AF_UNIX) as stream:
                stream.settimeout(3)
                stream.connect("\0" + name[1:] if name.startswith("@") else name)
                try:
                    said[name] = base64.b64encode(stream.recv(1 << 20)).decode()
                except TimeoutError:
                    said[name] = ""
        except OSError:
            continue
    return said


def answers(address=TRAINER):
    """Method, and its answer in base64 or the name of its error, for every method and body."""
    import grpc

    found = []
    with grpc.insecure_channel("unix:" + address) as channel:
        for method in METHODS:
            for body in (*BODIES, os.urandom(64)):
                try:
                    answer = channel.unary_unary("/" + method)(body, timeout=20)
                    found.append((method, "answer", base64.b64encode(answer).decode()))
                except grpc.RpcError as error:
                    found.append((method, error.code().name, error.details() or ""))
    return found


def written():
    """Where something could be put, and whether the trainer's socket could be taken away."""
    for path in PLACES:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            os.remove(path)
        except OSError:
            continue
        yield path
    try:
        os.rename(TRAINER, TRAINER + ".mine")
        os.rename(TRAINER + ".mine", TRAINER)
        yield TRAINER
    except OSError:
        pass


def risen():
    """Rights that could be had: another user, a device, a mount, a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    attempts = {
        "setuid": lambda: os.setuid(0),
        "mknod": lambda: os.mknod("/tmp/disk", stat.S_IFBLK | 0o600, os.makedev(254, 0)),
        "mount": lambda: 1 / (libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0),
        "unshare": lambda: 1 / (libc.unshare(0x10000000) == 0),
        "chroot": lambda: os.chroot("/tmp"),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except (OSError, ZeroDivisionError):
            continue
        yield name


def look():
    """Everything that was found, as one JSON object."""
    started = time.monotonic()
    found = {"files": files(), "sockets": sockets(), "answers": answers(), "written": sorted(written())}
    # Last: whoever has risen sees other files.
    return found | {"risen": sorted(risen()), "user": os.getuid(), "seconds": time.monotonic() - started}


if __name__ == "__main__":
    print(json.dumps(look()))
