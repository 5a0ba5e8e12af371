"""How far a program in the sandbox is kept from the machine: three levels, each with all that stands before it.

    limits      resource limits of the kernel, and an audit hook inside the interpreter; any POSIX platform
    seccomp     a filter of system calls, made by libseccomp (pyseccomp): no process, no program, no socket, no signal,
                no file opened for writing, no limit raised; Linux with libseccomp.so.2
    bubblewrap  namespaces by bwrap: no network, no process of the machine in sight, and of the file system the
                interpreter and the system's libraries alone, read-only; Linux with bwrap and user namespaces

The first is no security boundary: an audit hook can be got round from inside the interpreter. The third is what a
program that may mean harm should run under; the kernel stays shared in all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

LEVELS = ("limits", "seccomp", "bubblewrap")
STRONGEST = "strongest"
PROBE_TIMEOUT_S = 20

_EPERM, _ENOSYS = 1, 38
_CLONE_THREAD = 0x10000
_DENIED = (
    # processes, programs and other processes' insides
    "fork vfork execve execveat ptrace process_vm_readv process_vm_writev pidfd_open pidfd_getfd unshare setns "
    # signals: to oneself too, since a process cannot be told apart from its threads here
    "kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal "
    # outside
    "socket socketpair connect bind "
    # files
    "creat unlink unlinkat rename renameat renameat2 mkdir mkdirat rmdir link linkat symlink symlinkat mknod mknodat "
    "truncate ftruncate chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes utimensat futimesat "
    "setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr fallocate memfd_create "
    # the machine
    "mount umount2 pivot_root chroot move_mount open_tree fsopen fsmount mount_setattr swapon swapoff reboot "
    "kexec_load kexec_file_load init_module finit_module delete_module settimeofday clock_settime adjtimex "
    "sethostname setdomainname bpf perf_event_open userfaultfd io_uring_setup add_key request_key keyctl "
    "shmget msgget semget mq_open setrlimit name_to_handle_at open_by_handle_at quotactl acct iopl ioperm"
).split()


@dataclasses.dataclass(frozen=True)
class Isolation:
    """What the sandbox's server is started with. `syscall_filter` is a BPF program; empty without one."""

    level: str
    command: tuple[str, ...]  # stands before the interpreter's own arguments
    syscall_filter: bytes


def isolate(level: str, script: str) -> Isolation:
    """The isolation of that level for a server that runs `script`; "strongest" takes the best that is there.

    ValueError for an unknown level, or one that this machine cannot give.
    """
    if level not in (*LEVELS, STRONGEST):
        raise ValueError(f"isolation {level!r} is not one of {(STRONGEST, *LEVELS)}")
    reasons = {}
    for each in reversed(LEVELS) if level == STRONGEST else (level,):
        reasons[each] = missing(each)
        if not reasons[each]:
            command = _bubblewrap(script) if each == "bubblewrap" else (sys.executable,)
            return Isolation(each, command, b"" if each == "limits" else _syscall_filter())
    raise ValueError(f"this machine cannot give the isolation {level!r}: {reasons[level]}")


@functools.cache
def missing(level: str) -> str:
    """What this machine lacks for a level, in one sentence; empty if it lacks nothing. Tried once a process."""
    if level == "limits":
        return ""
    if sys.platform != "linux":
        return f"it needs Linux, this is {sys.platform}"
    try:
        if not _syscall_filter():
            return "libseccomp made no filter"
    except (ImportError, OSError, RuntimeError) as error:
        return f"the filter of system calls needs libseccomp.so.2 and pip install pyseccomp ({error})"
    if level == "seccomp":
        return ""
    if not shutil.which("bwrap"):
        return "there is no bwrap: install bubblewrap"
    command = [*_bubblewrap(__file__), "-S", "-c", "pass"]
    probe = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, env={})
    return "" if probe.returncode == 0 else f"bwrap fails: {probe.stderr.strip()[-200:]}"


def _bubblewrap(script: str) -> tuple[str, ...]:
    """The interpreter under bwrap: what it needs to run at all, read-only, and nothing else."""
    interpreter = os.path.realpath(sys.executable)
    arguments = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    arguments += ["--uid", "65534", "--gid", "65534", "--hostname", "sandbox"]
    system = ["/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/lib", "/lib64", "/etc/ld.so.cache"]
    places = dict.fromkeys([*system, sys.base_prefix, str(pathlib.Path(interpreter).parent), os.path.realpath(script)])
    for place in places:
        if os.path.islink(place):  # /lib is a link to /usr/lib on merged systems
            arguments += ["--symlink", os.readlink(place), place]
        else:
            arguments += ["--ro-bind-try", place, place]
    arguments += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"]
    return (*arguments, "--", interpreter)


@functools.cache
def _syscall_filter() -> bytes:
    import pyseccomp

    deny = pyseccomp.ERRNO(_EPERM)
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)

    def add(action, name, *arguments):
        try:
            rules.add_rule(action, name, *arguments)
        except (RuntimeError, OSError, ValueError):  # a call that this architecture or libseccomp does not know
            pass

    for name in _DENIED:
        add(deny, name)
    # glibc falls back from these to calls whose arguments can be looked at.
    for name in ("clone3", "openat2"):
        add(pyseccomp.ERRNO(_ENOSYS), name)
    add(deny, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _CLONE_THREAD, 0))
    add(deny, "prlimit64", pyseccomp.Arg(2, pyseccomp.NE, 0))
    for flag in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC):
        add(deny, "open", pyseccomp.Arg(1, pyseccomp.MASKED_EQ, flag, flag))
        add(deny, "openat", pyseccomp.Arg(2, pyseccomp.MASKED_EQ, flag, flag))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
