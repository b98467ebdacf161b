"""The demo's own broker: amqtt on loopback, MQTT 3.1.1, gone with its parent. Never for a plant."""

import asyncio
import contextlib
import logging
import os
import signal
import sys


async def _serve(port: int) -> None:
    from amqtt.broker import Broker  # noqa: PLC0415 - only in the demo extra

    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
    )
    await broker.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    parent = os.getppid()
    while not stop.is_set() and os.getppid() == parent:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), 1)
    await broker.shutdown()


def main() -> int:
    """Serve on the loopback port given as the only argument until SIGTERM or until the parent is gone."""
    logging.disable(logging.ERROR)
    asyncio.run(_serve(int(sys.argv[1])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
