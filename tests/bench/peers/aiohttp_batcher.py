"""The real competitor: a dynamic batcher on aiohttp in about fifty lines, as anybody would write it. Runs in its own virtual environment.

`aiohttp_batcher.py MODEL PORT`: POST / takes one sample's bytes and returns the answer's. EAGER=1 dispatches when idle instead of waiting
10 ms for a batch to fill; QMAX=16 refuses with 503 beyond so many waiting requests.
"""

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import uvloop
from aiohttp import web

MAX_BATCH, WAIT_S = 8, 0.01
EAGER, QMAX = bool(os.environ.get("EAGER")), int(os.environ.get("QMAX", "0"))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
shape = session.get_inputs()[0].shape[1:]
queue: asyncio.Queue[tuple[np.ndarray, asyncio.Future[bytes]]] = asyncio.Queue()


def run(samples: list[np.ndarray]) -> list[bytes]:
    return [row.tobytes() for row in session.run(None, {"x": np.stack(samples)})[0]]


async def batcher(_app: web.Application) -> None:
    loop, pool = asyncio.get_running_loop(), ThreadPoolExecutor(1)
    while True:
        batch = [await queue.get()]
        due = loop.time() + WAIT_S
        while len(batch) < MAX_BATCH:
            if not queue.empty():
                batch.append(queue.get_nowait())
            elif EAGER or due <= loop.time():
                break
            else:
                try:
                    async with asyncio.timeout_at(due):
                        batch.append(await queue.get())
                except TimeoutError:
                    break
        answers = await loop.run_in_executor(pool, run, [sample for sample, _ in batch])
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)


async def infer(request: web.Request) -> web.Response:
    if QMAX and queue.qsize() >= QMAX:
        return web.Response(status=503)
    future = asyncio.get_running_loop().create_future()
    queue.put_nowait((np.frombuffer(await request.read(), np.float32).reshape(shape), future))
    return web.Response(body=await future)


async def start(app: web.Application) -> None:
    app["batcher"] = asyncio.create_task(batcher(app))


uvloop.install()
app = web.Application()
app.add_routes([web.post("/", infer)])
app.on_startup.append(start)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[2]), print=None, access_log=None)
