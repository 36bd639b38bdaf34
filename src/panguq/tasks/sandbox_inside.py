"""What runs inside the sandbox: it closes the door behind itself, then runs a program from stdin.

    python -I -S -c THIS_TEXT LIMITS [ROOT PATH …]

Never imported: a sandbox has Python's standard library and nothing else. With a ROOT, an empty
folder, the root of this mount namespace becomes a tmpfs with the PATHs read-only in it; `bwrap`
does that by itself. LIMITS is JSON: bytes of `memory` and of a `file`, `processes`, `seconds`,
and whether it is `inside` namespaces, and to become `nobody` since it was started by root.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT = 1, 2, 4, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
SYS_PIVOT_ROOT, SYS_CAPSET = {"x86_64": (155, 126), "aarch64": (41, 91)}.get(
    os.uname().machine, (0, 0)
)
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
CLONE_NEWUSER, NOBODY = 1 << 28, 65534
CAPABILITIES, CAPABILITY_VERSION = 41, 0x20080522
LIBC = ctypes.CDLL(None, use_errno=True)


def _call(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    _call(LIBC.mount(*words, ctypes.c_ulong(flags), options.encode()), f"mount {target}")


def _flags(path: str) -> int:
    """Those of its mount that a user namespace may not take away."""
    found = os.statvfs(path).f_flag
    return found & (MS_NOSUID | MS_NODEV | 8 | 1024 | 2048 | (1 << 21))


def enter(root: str, paths: list[str], tmpfs: int) -> None:
    """Make `root` a tmpfs with these paths read-only and a /proc of its own, and move there."""
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={tmpfs},nr_inodes=2048,mode=755")
    os.chmod(root, 0o755)
    for path in paths:
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
            continue
        os.makedirs(root + path, exist_ok=True)
        _mount(path, root + path, None, MS_BIND | MS_REC)
        _mount("none", root + path, None, MS_BIND | MS_REMOUNT | MS_RDONLY | _flags(path))
    for name in ("proc", "tmp", "dev"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    os.chmod(f"{root}/tmp", 0o1777)
    _mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV)
    for name in ("null", "zero", "urandom"):
        open(f"{root}/dev/{name}", "x").close()
        _mount(f"/dev/{name}", f"{root}/dev/{name}", None, MS_BIND)
    os.chdir(root)
    _call(LIBC.syscall(SYS_PIVOT_ROOT, b".", b"."), "pivot_root")
    _call(LIBC.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/tmp")


def become_nobody() -> None:
    """Of the machine's root, a user whose processes can be limited, in a user namespace."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    _call(LIBC.unshare(CLONE_NEWUSER), "unshare")


def drop_rights() -> None:
    """No capability is left, and none can be had again."""
    for capability in range(CAPABILITIES):
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # the last ones may be unknown here
    header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    _call(LIBC.syscall(SYS_CAPSET, header, none), "capset")


def limit(limits: dict[str, int]) -> None:
    """What a process may take from here on, for good."""
    for name, value in (
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_FSIZE, limits["file"]),
        (resource.RLIMIT_CPU, limits["seconds"] + 1),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (value, value))
    _call(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def run_stdin() -> None:
    """Run what stdin holds as a program of its own."""
    source = sys.stdin.read()
    sys.argv = ["answer.py"]
    with open(os.devnull) as sys.stdin:
        exec(compile(source, "answer.py", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if len(sys.argv) > 2:
        enter(sys.argv[2], sys.argv[3:], given["file"])
    if given["nobody"]:
        become_nobody()
    if given["inside"]:
        drop_rights()
    limit(given)
    run_stdin()
