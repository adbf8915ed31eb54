"""Ask many requests at once, in threads."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable

from eval_runner.evaluators.gpt.budget import Ended
from eval_runner.evaluators.gpt.records import Reply, Request


def run(
    todo: Iterable[tuple[str, Request]],
    answer: Callable[[Request, threading.Event], Reply],
    arrived: Callable[[str, Reply], None],
    concurrency: int,
) -> None:
    """Answer all requests, at most `concurrency` at once; `arrived` is called in this thread as each comes, by its key.

    Raises the first error of `answer`, once what is in flight has ended; the event that `answer` is given is set then,
    and it raises Ended for what it has not sent.
    """
    work = deque(todo)
    results: queue.SimpleQueue[tuple[str, Reply] | BaseException | None] = queue.SimpleQueue()
    ending = threading.Event()

    def ask() -> None:
        try:
            while not ending.is_set():
                key, request = work.popleft()
                results.put((key, answer(request, ending)))
        except (IndexError, Ended):
            pass
        except BaseException as error:      # for the thread that waits
            ending.set()
            results.put(error)
        finally:
            results.put(None)

    # Daemons: when this thread is told to stop, the process need not wait for what is in flight.
    threads = [threading.Thread(target=ask, name="asks", daemon=True) for _ in range(min(concurrency, len(work)))]
    for thread in threads:
        thread.start()
    first: BaseException | None = None
    try:
        for _ in threads:
            while (result := results.get()) is not None:
                if isinstance(result, BaseException):
                    first = first or result
                else:
                    arrived(*result)
    finally:
        ending.set()
    if first is not None:
        raise first
