"""Workers of a process that is killed end, too."""

import os
import signal
import subprocess
import sys
import time

import pytest
from places import ROOT

KEEPER = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from hovle.machine.processes import end_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context(sys.argv[1]), initializer=end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(300)
"""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"  # ended, but nobody has asked how
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_the_workers_of_a_killed_process_end(start, tmp_path):
    script = tmp_path / "keeper.py"
    script.write_text(KEEPER, encoding="utf-8")
    keeper = subprocess.Popen(
        [sys.executable, str(script), start],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with keeper.stdout:
        worker = int(keeper.stdout.readline())
    assert is_alive(worker)
    keeper.send_signal(signal.SIGKILL)
    keeper.wait()
    deadline = time.monotonic() + 60
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(worker)
