"""TCP links on the loopback interface that take their time: each byte arrives a fixed delay after it was sent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def delayed_links(targets: dict[int, int], delay_seconds: float) -> Iterator[None]:
    """Forwards each port of ``targets`` to the port it maps to, both ways, while the ``with`` block runs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        for port, target in targets.items():
            asyncio.run_coroutine_threadsafe(_forward(port, target, delay_seconds), loop).result(10)
        yield
    finally:
        asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _forward(port: int, target: int, delay_seconds: float) -> None:
    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            writer.close()  # the target does not listen yet: the caller will try again
            return
        await asyncio.gather(_pipe(reader, other_writer, delay_seconds), _pipe(other_reader, writer, delay_seconds))

    await asyncio.start_server(connect, "127.0.0.1", port)


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_seconds: float) -> None:
    loop = asyncio.get_running_loop()
    waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def deliver() -> None:
        while True:
            due, data = await waiting.get()
            await asyncio.sleep(due - loop.time())
            if not data:
                writer.close()
                return
            writer.write(data)
            await writer.drain()

    delivery = asyncio.ensure_future(deliver())
    try:
        while data := await reader.read(1 << 20):
            waiting.put_nowait((loop.time() + delay_seconds, data))
    except ConnectionError:
        pass
    waiting.put_nowait((loop.time() + delay_seconds, b""))
    await delivery


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
