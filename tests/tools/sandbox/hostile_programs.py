"""Programs that try to get out of the sandbox, or to hurt it. One that succeeds prints ESCAPED."""

# The test fills in @SECRET@ (a file outside), @TARGET@ (a path to write), @FOLDER@, @PID@ (the host) and @PORT@.
PROGRAMS = {
    "endless loop": "while True: pass",
    "endless sleep": "import time\ntime.sleep(1000)",
    "endless loop in C": "sum(range(10 ** 12))",
    "huge power": "print(9 ** 9 ** 9)",
    "catastrophic regular expression": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "signals ignored": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass""",
    "signal handler that goes on": """
import signal
signal.signal(signal.SIGXCPU, lambda *a: None)
signal.signal(signal.SIGALRM, lambda *a: None)
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
while True: pass""",
    "exceptions swallowed": """
while True:
    try:
        while True: pass
    except BaseException: pass""",
    "fork bomb": """
import os
while True:
    os.fork()
    print('ESCAPED')""",
    "fork by the private module": """
import _posixsubprocess as p, os
r, w = os.pipe()
p.fork_exec([b'/bin/true'], [b'/bin/true'], True, (w,), None, None, -1, -1, -1, -1, -1, -1, r, w, False, False, -1,
    None, None, None, -1, None, False)
print('ESCAPED')""",
    "subprocess": "import subprocess\nsubprocess.Popen(['sleep', '1000'])\nprint('ESCAPED')",
    "os.system": "import os\nprint('ESCAPED' if os.system('true') == 0 else 'no')",
    "exec of another program": "import os\nos.execv('/bin/echo', ['echo', 'ESCAPED'])",
    "spawn": "import os\nos.posix_spawn('/bin/echo', ['echo', 'ESCAPED'], {})",
    "zombies": """
import os
for _ in range(100):
    if os.fork() == 0: os._exit(0)
print('ESCAPED')""",
    "daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1000)
print('ESCAPED')""",
    "multiprocessing": """
import multiprocessing
context = multiprocessing.get_context('fork')
process = context.Process(target=print, args=('ESCAPED',))
process.start()
process.join()""",
    "thread bomb": """
import threading, time
while True:
    threading.Thread(target=time.sleep, args=(1000,)).start()""",
    "memory bomb": "data = []\nwhile True: data.append(bytearray(10 ** 7))",
    "memory bomb at once": "print(len(bytearray(10 ** 11)) and 'ESCAPED')",
    "deep recursion": "def f(): f()\nf()",
    "deep recursion without a limit": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",
    "deep nesting": "eval('(' * 100000 + ')' * 100000)",
    "huge output": "while True: print('x' * 10 ** 6)",
    "huge stderr": "import sys\nwhile True: sys.stderr.write('x' * 10 ** 6)",
    "binary output": "import sys\nsys.stdout.buffer.write(bytes(range(256)) * 100)",
    "output without an end of line": "import sys\nwhile True: sys.stdout.write('x')",
    "closed streams": "import os\nos.closerange(0, 256)\nwhile True: pass",
    "write a file": "open('@TARGET@', 'w').write('x')\nprint('ESCAPED')",
    "write by os.open": "import os\nos.open('@TARGET@', os.O_CREAT | os.O_WRONLY)\nprint('ESCAPED')",
    "write by a database": """
import sqlite3
sqlite3.connect('@TARGET@').execute('create table t (x)')
print('ESCAPED')""",
    "make a folder": "import os\nos.mkdir('@TARGET@')\nprint('ESCAPED')",
    "symbolic link": "import os\nos.symlink('@SECRET@', '@TARGET@')\nprint('ESCAPED')",
    "hard link": "import os\nos.link('@SECRET@', '@TARGET@')\nprint('ESCAPED')",
    "remove a file": "import os\nos.remove('@SECRET@')\nprint('ESCAPED')",
    "change a mode": "import os\nos.chmod('@SECRET@', 0o777)\nprint('ESCAPED')",
    "pipe in the file system": "import os\nos.mkfifo('@TARGET@')\nprint('ESCAPED')",
    "read a secret": "print('ESCAPED', open('@SECRET@').read())",
    "read a secret by way of the library": """
import os
path = os.path.dirname(os.__file__) + '/../' * 30 + '@SECRET@'
print('ESCAPED', open(path).read())""",
    "read a secret by os.open": """
import os
print('ESCAPED', os.read(os.open('@SECRET@', os.O_RDONLY), 100))""",
    "list a folder": "import os\nprint('ESCAPED', os.listdir('@FOLDER@'))",
    "the environment of the host": "print('ESCAPED', open('/proc/@PID@/environ', 'rb').read())",
    "its own environment": """
import os
print('ESCAPED' if set(os.environ) - {'PYTHONHASHSEED', 'LC_CTYPE', 'PWD'} else 'clean')""",
    "the memory of the host": "open('/proc/@PID@/mem', 'rb')\nprint('ESCAPED')",
    "ptrace": """
import ctypes
libc = ctypes.CDLL(None)
print('ESCAPED' if libc.ptrace(16, @PID@, 0, 0) == 0 else 'no')""",
    "ptrace by the interpreter's own handle": """
import sys
frame = sys._getframe()
while frame:
    for name in ('ctypes', 'prctl'):
        if name in frame.f_globals or name in frame.f_locals: print('ESCAPED', name)
    frame = frame.f_back""",
    "socket": "import socket\nsocket.create_connection(('127.0.0.1', @PORT@))\nprint('ESCAPED')",
    "socket by the private module": """
import _socket
s = _socket.socket()
s.connect(('127.0.0.1', @PORT@))
print('ESCAPED')""",
    "name look-up": "import socket\nsocket.getaddrinfo('localhost', 80)\nprint('ESCAPED')",
    "download": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:@PORT@')\nprint('ESCAPED')",
    "kill the host": "import os\nos.kill(@PID@, 0)\nprint('ESCAPED')",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)\nprint('ESCAPED')",
    "kill everybody": "import os\nos.kill(-1, 0)\nprint('ESCAPED')",
    "kill by a thread's signal": "import signal\nsignal.pidfd_send_signal(0, 9)\nprint('ESCAPED')",
    "raise the limits": """
import resource
resource.setrlimit(resource.RLIMIT_AS, (2 ** 40, 2 ** 40))
print('ESCAPED')""",
    "crash of the interpreter": "import ctypes\nctypes.string_at(0)",
    "crash by byte code": "exec((lambda: 0).__code__.replace(co_code=b'\\x64\\xff' * 9))",
    "abort": "import os\nos.abort()",
    "faked result": """
import os
os.write(1, b'{"status": "ok", "stdout": "ESCAPED2"}')
os._exit(7)""",
    "inherited descriptors": """
import os
for number in range(3, 1024):
    try: os.write(number, b'x')
    except OSError: continue
    print('ESCAPED', number)""",
    "audit hook of its own": "import sys\nsys.addaudithook(lambda *a: None)\nopen('@TARGET@', 'w')\nprint('ESCAPED')",
    "hook removed by reload": """
import importlib, os, sys
importlib.reload(os)
os.open('@TARGET@', os.O_CREAT | os.O_WRONLY)
print('ESCAPED')""",
    "hook seen by the garbage collector": """
import gc
for each in gc.get_objects():
    if getattr(each, '__name__', '') == '_refuse': print('ESCAPED')""",
    "mount": "import ctypes\nctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, 0)\nprint('ESCAPED')",
    "shared memory": """
from multiprocessing import shared_memory
shared_memory.SharedMemory(create=True, size=10)
print('ESCAPED')""",
    "code that hides in a pickle": "import pickle\npickle.loads(b'cos\\nsystem\\n(S\"echo ESCAPED\"\\ntR.')",
}
