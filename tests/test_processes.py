"""A process ends with the one that started it, a program as well as a worker of multiprocessing; signals interrupt it
once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from molmo2_nemo.processes import process_start, stopped_by_signals

CHILD = "from molmo2_nemo.processes import die_with_parent; die_with_parent(); print(flush=True); time.sleep(600)"
PROGRAM = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; {CHILD}"], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""
WORKER = """
import multiprocessing, sys, threading, time
from molmo2_nemo.processes import die_with_parent

def work(ready):
    die_with_parent()
    ready.set()
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=work, args=(ready,))
    starter = threading.Thread(target=child.start)  # a thread that ends is no parent that is gone
    starter.start()
    starter.join()
    ready.wait()
    time.sleep(1.5)
    print(child.pid if child.is_alive() else "dead", flush=True)
    time.sleep(600)
"""

# Children that are still importing when their parent is killed.
SLOW_CHILD = """
import time
print(flush=True)
time.sleep(1)
from molmo2_nemo.processes import die_with_parent
die_with_parent()
time.sleep(600)
"""
SLOW_PROGRAM = f"""
import os, subprocess, sys, time
from molmo2_nemo.processes import as_parent
env = {{**os.environ, **as_parent()}}
child = subprocess.Popen([sys.executable, "-c", {SLOW_CHILD!r}], stdout=subprocess.PIPE, env=env)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""
SLOW_WORKER = """
import multiprocessing, time
from molmo2_nemo.processes import die_with_parent

def work():
    time.sleep(1)
    die_with_parent()
    time.sleep(600)

if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    print(child.pid, flush=True)
    time.sleep(600)
"""

# A child of a launcher that goes on when the program which started it is killed; and one that is still importing then.
OWNED_CHILD = """
import os, sys, time
from molmo2_nemo.processes import stop_with_owner
print(os.getpid(), flush=True)
time.sleep(DELAY)
if not stop_with_owner():
    sys.exit()
time.sleep(600)
"""
OWNED_PROGRAM = f"""
import os, subprocess, sys, time
from molmo2_nemo.processes import as_owner
launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
subprocess.Popen([sys.executable, "-c", launcher, {OWNED_CHILD!r}], env={{**os.environ, **as_owner()}})
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize(
    "code",
    [
        PROGRAM,
        WORKER,
        SLOW_PROGRAM,
        SLOW_WORKER,
        PROGRAM.replace("die_with_parent", "stop_with_owner"),
        OWNED_PROGRAM.replace("DELAY", "0"),
        OWNED_PROGRAM.replace("DELAY", "1"),
    ],
    ids=["program", "worker", "slow program", "slow worker", "signalled program", "owned", "slow owned"],
)
def test_a_child_ends_with_its_killed_parent(code):
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    began = process_start(child)
    assert began is not None
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(1200):
        if process_start(child) != began:
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child is still there")


def test_process_start():
    began = process_start(os.getpid())
    assert began is None or began > 0
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert process_start(child.pid) is None


def test_a_signal_that_comes_again_does_not_interrupt_what_the_first_has_begun():
    before, done = signal.getsignal(signal.SIGTERM), False
    with stopped_by_signals(), pytest.raises(KeyboardInterrupt):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(os.getpid(), number)
            done = True
    assert done and signal.getsignal(signal.SIGTERM) is before
