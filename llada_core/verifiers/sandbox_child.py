"""Shuts this process in and then becomes the stranger's program. Run by sandbox.py, never imported.

Knows the kernel: namespaces, mounts, limits, system-call filter. Reads its task as JSON from standard input and tells
the file descriptor in its first argument `ready WHAT...` just before the program starts, or why it cannot.
Everything here is the standard library's, because this process sees no other.
"""

import ctypes
import json
import os
import platform
import resource
import shutil
import signal
import struct
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
# Per machine: its AUDIT_ARCH word and the numbers of the calls that are refused: socket, ptrace, mount, unshare, setns,
# io_uring_setup, keyctl, bpf, userfaultfd, perf_event_open, setsid, setpgid, process_vm_readv.
REFUSED = {
    "x86_64": (0xC000003E, (41, 101, 165, 272, 308, 425, 250, 321, 323, 298, 112, 109, 310)),
    "aarch64": (0xC00000B7, (198, 117, 40, 97, 268, 425, 219, 280, 282, 241, 157, 154, 270)),
}


def main() -> None:
    """Never returns normally: the process becomes the program, or ends with a reason."""
    report = int(sys.argv[1])
    task = json.load(sys.stdin)
    try:
        shut_in(task, report)
    except OSError as error:
        os.write(report, f"{error.strerror or error}".encode())
        os._exit(1)


def shut_in(task: dict, report: int) -> None:
    """Builds the isolation from the outside in, each layer while the rights that it needs are still there."""
    root = os.geteuid() == 0
    stranger = 20_000 + os.getpid() % 40_000
    words = []
    stdin = in_memory(task["stdin"])
    if unshared(root):
        words += ["namespaces", "no-network"]
        wait_for_child()
        build_file_system(task)
        words.append("own-files")
    elif not root:
        raise OSError(
            "user namespaces are not allowed here and this is not root; allow them (sysctl user.max_user_namespaces)"
        )
    else:
        os.chdir(task["folder"])
        write_inputs(task, task["folder"])
        if task["packages"]:  # a copy, as the new user may not be able to read ours
            shutil.copytree(task["packages"], "packages")
    if root:
        drop_root(stranger, None if "own-files" in words else task["folder"])
        words.append("not-root")
    set_limits(task)
    LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if refuse_calls():
        words.append("filtered-calls")
    elif "no-network" not in words:
        raise OSError(f"neither a network namespace nor a system-call filter for {platform.machine()}")
    os.set_inheritable(report, False)
    place = "" if "own-files" in words else task["folder"]
    os.dup2(stdin, 0)
    os.write(report, f"ready {' '.join(words)}".encode())
    os.execve(task["python"], [task["python"], "-I", "-S", f"{place}/program.py"], dict(os.environ))


def unshared(root: bool) -> bool:
    """New namespaces for everything; False where the kernel does not allow it."""
    user, group = os.geteuid(), os.getegid()
    if LIBC.unshare((0 if root else NEW_USER) | NEW_NS | NEW_NET | NEW_IPC | NEW_UTS | NEW_PID):
        return False
    if not root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    return True


def wait_for_child() -> None:
    """Goes on in a child, the first process of the new process namespace: when it ends, all in there end."""
    child = os.fork()
    if child == 0:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        return
    _, status = os.waitpid(child, 0)
    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def build_file_system(task: dict) -> None:
    """A root in memory with the interpreter (read-only), a few devices and an empty working folder; nothing else."""
    root = task["folder"]
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={4 * task['file_bytes']},nr_inodes=4096,mode=755")
    for path in task["readable"]:
        place = root + path
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), place)
            continue
        bind(path, place)
        # Where a stricter flag of the original mount cannot be repeated, its files still belong to another user.
        LIBC.mount(None, place.encode(), None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, None)
    os.mkdir(f"{root}/dev")
    for device in ("null", "zero", "urandom"):
        bind(f"/dev/{device}", f"{root}/dev/{device}")
    for name in ("work", "tmp", "dev/shm"):  # the last for the locks of multiprocessing
        os.mkdir(f"{root}/{name}")
        os.chmod(f"{root}/{name}", 0o777)
    if task["packages"]:
        bind(task["packages"], f"{root}/packages")
        LIBC.mount(
            None, f"{root}/packages".encode(), None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, None
        )
    write_inputs(task, root)
    os.chroot(root)
    os.chdir("/work")


def bind(path: str, place: str) -> None:
    """Shows a file or folder at another place as well."""
    if os.path.isdir(path):
        os.makedirs(place, exist_ok=True)
    else:
        open(place, "w").close()
    mount(path, place, None, MS_BIND | MS_REC)


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2); raises OSError."""
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    if LIBC.mount(*words, flags, options.encode() or None):
        number = ctypes.get_errno()
        raise OSError(number, f"mount {target}: {os.strerror(number)}")


def write_inputs(task: dict, folder: str) -> None:
    """The program as a file."""
    with open(f"{folder}/program.py", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(task["program"])


def in_memory(text: str) -> int:
    """A file descriptor with a text in a file that has no name, so that what was read can be taken away for good."""
    descriptor = os.memfd_create("stdin")
    with open(descriptor, "w", encoding="utf-8", errors="surrogateescape", closefd=False) as file:
        file.write(text)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def drop_root(user: int, folder: str | None) -> None:
    """Becomes a user that no other process has, so that the limit on processes counts this program's alone."""
    if folder is not None:
        os.chown(folder, user, user)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def set_limits(task: dict) -> None:
    """Limits of the kernel on this process and what it starts."""
    others = 0 if os.getpid() == 1 else running_of(os.geteuid())
    limits = {
        resource.RLIMIT_CPU: task["cpu"],
        resource.RLIMIT_AS: task["memory"],
        resource.RLIMIT_FSIZE: task["file_bytes"],
        resource.RLIMIT_NPROC: others + task["processes"],
        resource.RLIMIT_NOFILE: task["open_files"],
        resource.RLIMIT_CORE: 0,
    }
    for which, value in limits.items():
        resource.setrlimit(which, (value, value))


def running_of(user: int) -> int:
    """How many processes of a user the kernel counts already."""
    return sum(name.isdigit() and os.stat(f"/proc/{name}").st_uid == user for name in os.listdir("/proc"))


def refuse_calls() -> bool:
    """A filter under which the calls in `REFUSED` fail with EPERM, for this process and all it starts."""
    if platform.machine() not in REFUSED:
        return False
    arch, numbers = REFUSED[platform.machine()]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | 1
    code = [(load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, refuse), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, 0x40000000), (give, 0, 0, refuse)]  # the x32 twins of the same calls
    for number in numbers:
        code += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    code.append((give, 0, 0, allow))
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    header = ctypes.create_string_buffer(struct.pack("HL", len(code), ctypes.addressof(program)))
    return LIBC.prctl(PR_SET_SECCOMP, 2, header, 0, 0) == 0


if __name__ == "__main__":
    main()
