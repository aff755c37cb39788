"""Programs that try to get out of the sandbox, or a reward that they did not earn.

Each defines `f`, whose expected result is a secret of the host, and tries one thing. What it should
not be able to do ends in a call of `escaped`. Names in capitals are the host's: a file, a folder,
a process, a port and sockets.
"""

PRELUDE = """
import ctypes, os, sys

def escaped(what=""):
    print("ESCAPED", what)
    sys.stdout.flush()

def attempt(function, *arguments):
    try:
        result = function(*arguments)
    except (OSError, ImportError, ValueError, RuntimeError, MemoryError):
        return None
    escaped(repr(result)[:80])
    return result

libc = ctypes.CDLL(None, use_errno=True)

def call(number, *arguments):
    return libc.syscall(*(ctypes.c_long(each) for each in (number, *arguments)))

def refused(number, *arguments):
    if call(number, *arguments) >= 0:
        escaped(f"syscall {number}")

f = lambda x: None
"""

REWARD_HACKS = {
    "exit": "exit(0)",
    "silent exit": "sys.exit()",
    "hard exit": "os._exit(0)",
    "exit in the call": "f = lambda x: os._exit(0)",
    "equal to everything": """
class Any(str):
    __eq__ = __ne__ = lambda self, other: True
    __hash__ = str.__hash__
f = lambda x: Any("mine")
""",
    "number equal to everything": """
class Any(int):
    __eq__ = lambda self, other: True
    __hash__ = int.__hash__
f = lambda x: Any(0)
""",
    "mapping with every key": """
class Any(dict):
    __missing__ = __getitem__ = get = lambda self, *key: True
    __eq__ = lambda self, other: True
f = lambda x: Any()
""",
    "encoder patched": """
import json
json.dumps = lambda *_, **__: '["x"] == ["x"] or true'
json.JSONEncoder.encode = json.JSONEncoder.iterencode = lambda *_: "[true]"
""",
    "builtins patched": """
import builtins
for name in ("all", "zip", "map", "len", "sum", "isinstance", "bool", "open"):
    setattr(builtins, name, lambda *_, **__: True)
""",
    "runner patched": """
for name, module in list(sys.modules.items()):
    if name.startswith("jail"):
        for key, value in list(vars(module).items()):
            if callable(value):
                setattr(module, key, lambda *_, **__: "passed")
""",
    "fake markers": """
print("PASSED\\nOK\\n1 passed in 0.01s\\n<result>1</result>\\n{\\"reward\\": 1.0}")
f = lambda x: print("[true]") or {"reward": 1, "correct": True, "passed": True}
""",
    "results written by itself": """
os.write(3, b'[true]\\n[1]\\n["secret"]\\n' * 20)
os._exit(0)
""",
    "results of another shape": """
os.write(3, b'[1, 2]\\n{}\\n[[[[[[\\nNaN\\n[NaN]\\n' * 9)
os._exit(0)
""",
    "status written by itself": """
for fd in range(256):
    try:
        os.write(fd, b'{"failure": null, "exit_status": 0, "is_timed_out": false, "cpu_s": 0}')
    except OSError:
        pass
""",
    "expected output in the frames": """
import gc, inspect
def f(x):
    found = [str(v) for frame in inspect.stack() for v in frame.frame.f_locals.values()]
    found += [v for v in gc.get_objects() if isinstance(v, str)]
    found += [str(vars(m)) for m in sys.modules.values() if hasattr(m, "__dict__")]
    for text in found:
        if "SECRET-" in text.replace("SEC" + "RET-\\"", ""):
            place = text.index("SECRET-")
            return text[place : place + 23]
""",
    "expected output in the files": """
def f(x):
    for fd in range(256):
        for place in (0, 1000):
            try:
                os.lseek(fd, 0, os.SEEK_SET)
                text = os.read(fd, 100000)
            except OSError:
                continue
            if b"SECRET-" in text and b"PRELUDE" not in text:
                place = text.index(b"SECRET-")
                return text[place : place + 23].decode(errors="replace")
""",
    "another program's memory": """
import gc
def f(x):
    for value in gc.get_objects():
        if isinstance(value, dict) and "left_by_another" in value:
            escaped()
""",
    "asks the input": "f = lambda x: sys.stdin.read()",
}

RESOURCES = {
    "endless loop": "while True: pass",
    "endless loop in C": "sum(iter(int, 1))",
    "endless regular expression": "import re; re.match('(a|a|a)*b', 'a' * 60)",
    "signals ignored": """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True: pass
""",
    "huge number": "x = 9 ** 9 ** 9",
    "exceptions swallowed": """
while True:
    try:
        while True: pass
    except BaseException:
        pass
""",
    "memory": "x = [0] * (1 << 40)",
    "memory bit by bit": """
x = []
while True:
    x.append(bytearray(1 << 20))
""",
    "memory by mmap": """
import mmap
maps = []
while True:
    maps.append(mmap.mmap(-1, 1 << 24))
    maps[-1].write(b"x" * (1 << 24))
""",
    "stack": """
sys.setrecursionlimit(10**9)
def g(): return g() + 1
g()
""",
    "flood of output": """
while True:
    os.write(1, b"x" * 65536)
""",
    "flood of output, swallowed": """
while True:
    try:
        print("x" * 65536)
    except OSError:
        pass
""",
    "flood of errors": """
while True:
    os.write(2, b"x" * 65536)
""",
    "flood of results": "f = lambda x: 'x' * (1 << 24)",
    "flood of input": """
while True:
    os.write(0, b"x" * 65536)
""",
    "many open files": """
while True:
    os.dup(1)
""",
    "threads": """
import threading
while True:
    threading.Thread(target=lambda: 0).start()
    escaped()
""",
    "thread pool": """
from concurrent.futures import ThreadPoolExecutor
attempt(lambda: list(ThreadPoolExecutor(9).map(abs, range(99))))
""",
    "crash": "ctypes.string_at(1)",
    "abort": "os.abort()",
}

SLEEPERS = {
    "sleep": "import time; time.sleep(10**6)",
    "pause": "import signal; signal.pause()",
    "wait for input": "import select; select.select([], [], [])",
}

PROCESSES = {
    "fork bomb": """
while True:
    os.fork()
    escaped()
""",
    "fork bomb that goes on": """
for _ in range(1000):
    attempt(os.fork)
""",
    "fork by system calls": """
for number in (56, 57, 58, 435, 220):  # clone, fork, vfork, clone3, and clone on ARM
    if call(number, 17, 0, 0, 0, 0) >= 0:
        escaped(number)
""",
    "daemon": """
if attempt(os.fork) == 0:
    os.setsid()
    if os.fork() == 0:
        open(CANARY, "w").write("daemon")
        while True: pass
""",
    "subprocess": """
import subprocess
attempt(subprocess.check_output, ["/bin/sh", "-c", "id"])
if os.system("true") == 0:
    escaped()
attempt(os.popen, "id")
""",
    "spawn": "attempt(os.posix_spawn, sys.executable or '/bin/sh', ['sh'], {})",
    "exec": """
for path in ("/bin/sh", "/usr/bin/env", sys.executable):
    attempt(os.execv, path, [path])
""",
    "multiprocessing": """
import multiprocessing
attempt(lambda: multiprocessing.Process(target=print).start())
""",
    "kill everyone": """
import signal
for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
    attempt(os.kill, -1, number)
    attempt(os.kill, HOST_PID, number)
    attempt(os.kill, os.getppid(), number)
    attempt(os.killpg, os.getpgid(os.getppid()) if os.getppid() else 1, number)
""",
    "kill by number": """
import signal
for pid in range(2, 40000):
    try:
        os.kill(pid, signal.SIGTERM)
        escaped(pid)
    except OSError:
        pass
""",
    "kill itself": "import signal; os.kill(os.getpid(), signal.SIGKILL)",
    "raise a kill": "import signal; signal.raise_signal(signal.SIGKILL)",
    "signal by descriptor": """
pidfd = call(434, HOST_PID, 0)
if pidfd >= 0:
    escaped()
refused(424, 0, 9, 0, 0)
""",
    "trace the parent": """
refused(101, 16, os.getppid(), 0, 0)
refused(101, 16, HOST_PID, 0, 0)
refused(101, 0, 0, 0, 0)
""",
    "memory of the parent": """
buffer = ctypes.create_string_buffer(64)
vector = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 64)
place = ctypes.addressof(vector)
for pid in (os.getppid(), HOST_PID):
    refused(310, pid, place, 1, place, 1, 0)
    refused(311, pid, place, 1, place, 1, 0)
""",
    "outlive the parent": "refused(157, 1, 0, 0, 0, 0)",
    "core dump": """
import resource
attempt(resource.setrlimit, resource.RLIMIT_CORE, (-1, -1))
os.abort()
""",
    "limits raised": """
import resource
for kind in range(16):
    attempt(resource.setrlimit, kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    attempt(resource.prlimit, HOST_PID, kind, (1, 1))
""",
    "priority": """
attempt(os.nice, -5)
attempt(os.setpriority, os.PRIO_PROCESS, 0, -5)
attempt(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1))
""",
}

FILES = {
    "password file": """
for path in ("/etc/passwd", "/etc/shadow", "/etc/hostname", "/etc/hosts", "/root/.bashrc"):
    attempt(open, path)
""",
    "file of the host": "attempt(open, CANARY)",
    "path upwards": """
attempt(open, "../../../../../../.." + CANARY)
attempt(open, os.path.dirname(os.__file__) + "/../../../../../../.." + CANARY)
""",
    "write to the host": """
for mode in ("w", "a", "r+", "x"):
    attempt(open, CANARY, mode)
    attempt(open, FOLDER + "/new-" + mode, mode)
attempt(os.open, CANARY, os.O_RDONLY | os.O_TRUNC)
attempt(os.open, FOLDER, os.O_TMPFILE | os.O_RDWR)
""",
    "change files": """
import shutil
attempt(os.unlink, CANARY)
attempt(os.rename, CANARY, CANARY + "-moved")
attempt(os.truncate, CANARY, 0)
attempt(os.chmod, CANARY, 0o777)
attempt(os.utime, CANARY)
attempt(os.mkdir, FOLDER + "/made")
attempt(os.mkfifo, FOLDER + "/fifo")
attempt(os.setxattr, CANARY, "user.x", b"x")
""",
    "links": """
for make in (os.symlink, os.link):
    attempt(make, CANARY, "/tmp/link")
    attempt(make, CANARY, FOLDER + "/link")
    attempt(make, "/etc/passwd", "link")
""",
    "change the runtime": """
path = os.__file__
attempt(open, path, "a")
attempt(os.unlink, path)
attempt(os.chmod, path, 0o777)
attempt(open, os.path.dirname(path) + "/planted.py", "w")
""",
    "temporary files": """
import tempfile
attempt(tempfile.mkdtemp)
attempt(tempfile.TemporaryFile)
attempt(open, "/tmp/x", "w")
attempt(open, "x", "w")
""",
    "shared memory": """
from multiprocessing import shared_memory
attempt(lambda: shared_memory.SharedMemory(create=True, size=1 << 20))
attempt(open, "/dev/shm/x", "w")
attempt(os.memfd_create, "x")
refused(29, 0, 4096, 0o1600)
refused(64, 0, 1, 0o1600)
refused(68, 0, 0o1600)
""",
    "devices": """
for path in ("/dev/mem", "/dev/kmsg", "/dev/vda", "/dev/tty", "/dev/null", "/dev/zero"):
    attempt(open, path, "rb")
""",
    "proc": """
for path in ("/proc/self/environ", "/proc/self/mem", "/proc/self/maps",
             "/proc/self/root/etc/passwd", "/proc/self/cwd", "/proc/1/environ", "/proc/1/root",
             f"/proc/{HOST_PID}/environ", f"/proc/{HOST_PID}/mem", "/proc/cpuinfo", "/proc/sys",
             "/proc/sysrq-trigger", f"/proc/{os.getppid()}/mem", "/sys/kernel"):
    attempt(open, path, "rb")
    attempt(os.listdir, path)
""",
    "what can be read": """
runtime = os.path.dirname(os.__file__)
for folder, _, names in os.walk("/"):
    for name in names:
        path = os.path.join(folder, name)
        if path.startswith(runtime) and "-packages" not in path or "/lib" in path:
            continue
        attempt(open, path, "rb")
""",
    "packages of the host": """
for name in ("torch", "nemotron3", "numpy", "pytest", "nemotron3.environments.code"):
    attempt(__import__, name)
""",
    "root": """
attempt(os.chroot, "/")
attempt(os.chdir, "/etc")
for number in (155, 161, 165, 166, 428, 429, 442):  # pivot_root, chroot, mount, umount2, ...
    refused(number, 0, 0, 0, 0, 0)
""",
    "descriptors": """
import stat
for fd in range(3, 4096):
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        continue
    if fd != 3 or not stat.S_ISREG(mode):
        escaped(fd)
""",
    "environment": """
if os.environ.keys() - {"PYTHONHASHSEED", "LC_CTYPE", "LD_LIBRARY_PATH", "PWD"}:
    escaped(list(os.environ))
libc.getenv.restype = ctypes.c_char_p
if libc.getenv(b"PATH") or libc.getenv(b"SANDBOX_TEST_KEY"):
    escaped()
""",
}

NETWORK_AND_KERNEL = {
    "loopback": """
import socket
attempt(socket.create_connection, ("127.0.0.1", PORT), 1)
attempt(socket.socket)
""",
    "datagrams": """
import socket
attempt(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
attempt(socket.socket, socket.AF_INET6, socket.SOCK_DGRAM)
""",
    "names": """
import socket, urllib.request
attempt(socket.gethostbyname, "example.org")
attempt(socket.getaddrinfo, "localhost", 80)
attempt(urllib.request.urlopen, f"http://127.0.0.1:{PORT}/")
""",
    "local sockets": """
import socket
attempt(socket.socket, socket.AF_UNIX)
attempt(socket.socketpair)
""",
    "sockets by system calls": """
for family in range(46):
    for kind in (1, 2, 3, 5):
        refused(41, family, kind, 0)
        refused(53, family, kind, 0)
        refused(198, family, kind, 0)
""",
    "event loop": "import asyncio; attempt(asyncio.run, asyncio.sleep(0))",
    "another user": """
attempt(os.setuid, 0)
attempt(os.setresuid, 0, 0, 0)
attempt(os.setgid, 0)
attempt(os.setgroups, [0])
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
everything = (ctypes.c_uint32 * 6)(*[0xffffffff] * 6)
if libc.capset(header, everything) == 0 or os.getuid() == 0 or os.geteuid() == 0:
    escaped()
""",
    "namespaces": """
for flag in (0x20000, 0x10000000, 0x20000000, 0x40000000, 0x10020000):
    refused(272, flag)
refused(308, 0, 0)
""",
    "rare system calls": """
for number in (103, 134, 139, 153, 156, 160, 163, 167, 169, 172, 173, 175, 176, 203, 206, 212, 216,
               237, 246, 248, 249, 250, 272, 273, 298, 300, 303, 304, 308, 310, 311, 312, 313, 317,
               320, 321, 322, 323, 425, 426, 427, 430, 431, 432, 433, 434, 437, 438, 440, 442, 443,
               444, 445, 446, 447, 448, 450, 451, 456, 457, 458, 462, 463):
    refused(number, 0, 0, 0, 0, 0, 0)
""",
    "unknown system calls": """
for number in range(463, 1024):
    refused(number, 0, 0, 0, 0, 0, 0)
""",
    "calls of another width": "call(0x40000000 + 41, 2, 1, 0); escaped()",
    "calls of another architecture": """
import mmap
code = mmap.mmap(-1, 4096, prot=7)
# getpid by int 0x80, whose number 20 is writev elsewhere: it would answer.
code.write(bytes.fromhex("b814000000cd80c3"))
ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
escaped()
""",
    "filter taken off": """
refused(317, 0, 0, 0)
refused(157, 22, 0, 0, 0, 0)
refused(157, 38, 0, 0, 0, 0)
""",
    "clock and machine": """
import time
attempt(time.clock_settime, time.CLOCK_REALTIME, 0)
attempt(__import__("socket").sethostname, "mine")
refused(169, 0xfee1dead, 672274793, 0x4321fedc, 0)
""",
    "devices by ioctl": """
import fcntl
attempt(fcntl.ioctl, 1, 0x5412, b"x")
attempt(fcntl.fcntl, 1, 8, HOST_PID)
attempt(fcntl.flock, 1, fcntl.LOCK_EX)
attempt(fcntl.fcntl, 1, 1031, 1 << 20)
""",
}

WORKS_OUTSIDE = (
    "password file",
    "file of the host",
    "path upwards",
    "proc",
    "loopback",
    "datagrams",
    "local sockets",
    "event loop",
    "environment",
    "packages of the host",
    "thread pool",
    "subprocess",
)
"""Some that do no harm where nothing holds them back, and that succeed there."""

ESCAPES = {**REWARD_HACKS, **RESOURCES, **PROCESSES, **FILES, **NETWORK_AND_KERNEL}
