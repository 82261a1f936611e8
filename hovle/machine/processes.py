"""Processes that work for this one."""

import multiprocessing
import os
import threading
from multiprocessing.process import BaseProcess


def end_with_parent() -> None:
    """As a pool's `initializer`: end this process when the one it works for is gone, killed for instance.

    A worker of a `ProcessPoolExecutor` holds both ends of its queue, so it would wait for work for ever. A process
    that works for none stays.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
