"""Processes that work for this one."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """As a pool's `initializer`: end this process when the one it works for is gone, killed for instance.

    A worker of a `ProcessPoolExecutor` holds both ends of its queue, so it would wait for work for ever.
    """
    threading.Thread(target=_wait_and_end, daemon=True).start()


def _wait_and_end() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # a pool's workers have one
    parent.join()
    os._exit(1)
