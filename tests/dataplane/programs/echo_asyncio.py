"""An echo server, and clients that check it, on asyncio: server|client ADDRESS PORT."""

import asyncio
import random
import signal
import sys


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(50000):
        writer.write(data)
        await writer.drain()
    writer.close()


async def call(number: int) -> None:
    chance = random.Random(number)
    reader, writer = await asyncio.open_connection(sys.argv[2], int(sys.argv[3]))
    for _ in range(60):
        data = chance.randbytes(chance.choice((1, 300, 9000, 200000)))
        writer.write(data)
        assert await reader.readexactly(len(data)) == data
    writer.write_eof()
    assert await reader.read() == b""
    writer.close()


async def main() -> None:
    if sys.argv[1] == "server":
        server = await asyncio.start_server(echo, sys.argv[2], int(sys.argv[3]))
        await server.serve_forever()
    await asyncio.gather(*(call(number) for number in range(20)))


# Otherwise a server that was started in the background ignores it (bash(1), SIGNALS).
signal.signal(signal.SIGINT, signal.default_int_handler)
asyncio.run(main())
