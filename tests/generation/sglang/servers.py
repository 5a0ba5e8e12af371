"""Real HTTP servers on the loopback interface: one that speaks SGLang's payloads, and a proxy that spoils its answers.

The policy of `ProtocolServer` is a function of the tokens and of the weights' label, so that a test knows what must
come. What the real server answers was recorded from sglang 0.5.23; test_real_server.py asks that one.
"""

import asyncio
import base64
import io
import json
import pathlib
import pickle
import threading

import aiohttp
import ml_dtypes
import numpy as np
from aiohttp import web

from orchestra_jax.generation.engine import Sampling

VOCAB_SIZE = 50
STOP = 7  # an id that ends turns here


def sampling(max_new_tokens=8, stop_ids=(STOP,), **settings):
    return Sampling(1.0, max_new_tokens, frozenset(stop_ids), 0, **settings)


def generate(engine, prompt, asked=None, **names):
    """One turn, in a loop of its own."""
    names = {"request_id": "r", "session_id": "s", **names}
    return asyncio.run(engine.generate(prompt, asked or sampling(), **names))


def next_token(tokens, version):
    return (sum(tokens) * 7 + 3 * len(tokens) + version) % VOCAB_SIZE


def rollout(prompt, version, count):
    """The next `count` tokens behind `prompt`."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, version))
    return tokens[len(prompt) :]


class TensorReader(pickle.Unpickler):
    """Reads a pickle of torch tensors without torch: arrays in their place."""

    def find_class(self, module, name):
        known = {
            ("torch.storage", "_load_from_bytes"): read_storage,
            ("torch._utils", "_rebuild_tensor_v2"): rebuild_array,
            ("collections", "OrderedDict"): dict,
        }
        return known[module, name]


class StorageReader(pickle.Unpickler):
    def find_class(self, module, name):
        types = {"FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16}
        return {("torch", storage): dtype for storage, dtype in types.items()}[module, name]

    def persistent_load(self, reference):
        return reference


def read_storage(data):
    """A storage as torch.save wrote it before its zip files."""
    file = io.BytesIO(data)
    magic, version, platform, reference, keys = (StorageReader(file).load() for _ in range(5))
    kind, dtype, key, location, count, view = reference
    assert (magic, version, platform["little_endian"]) == (0x1950A86A20F9469CFC6C, 1001, True)
    assert (kind, location, view, keys) == ("storage", "cpu", None, [key])
    assert int.from_bytes(file.read(8), "little") == count
    array = np.frombuffer(file.read(), dtype)
    assert len(array) == count
    return array


def rebuild_array(storage, offset, shape, strides, needs_gradient, hooks):
    assert (needs_gradient, hooks) == (False, {})
    strides = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides)


class LocalServer:
    """An aiohttp application in a thread and a loop of its own. A context manager."""

    def __init__(self, port=0):
        self.port = port

    def __enter__(self):
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        started.wait(10)
        return self

    def __exit__(self, *exception):
        self.stop()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def stop(self):
        """At once, as after kill -9: connections are cut."""
        if self._loop.is_running():
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join(10)

    def _run(self, started):
        async def serve():
            self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
            await self.open()
            application = web.Application(client_max_size=2**30)
            application.router.add_route("*", "/{path:.*}", self.handle)
            runner = web.AppRunner(application, shutdown_timeout=0, handler_cancellation=True)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True)
            await site.start()
            self.port = site._server.sockets[0].getsockname()[1]
            started.set()
            await self._stopped.wait()
            await runner.cleanup()
            await self.close()

        asyncio.run(serve())

    async def open(self):
        pass

    async def close(self):
        pass

    async def handle(self, request):
        raise NotImplementedError


class ProtocolServer(LocalServer):
    """Speaks /generate and the control calls. `token_s`: how long a token takes; `events`: what was asked, in order."""

    def __init__(self, port=0, label="default", token_s=0.0, is_incremental=False, eos=None):
        super().__init__(port)
        self.label, self.token_s, self.is_incremental, self.eos = label, token_s, is_incremental, eos
        self.events, self.payloads, self.loaded = [], [], []
        self.is_dead = False  # what an id outside the vocabulary does to the real one
        self.fail_update = self.leave_stale = self.is_busy = False
        self.is_released = False
        self.has_sessions, self.is_session_open, self.num_ranks = True, False, 1
        self.peak, self._under_way = 0, 0

    async def open(self):
        self._running = asyncio.Event()
        self._running.set()
        self._aborted = set()

    @property
    def is_paused(self):
        return not self._running.is_set()

    async def handle(self, request):
        body = await request.json() if request.can_read_body else {}
        path = "/" + request.match_info["path"]
        self.events.append(path)
        if path == "/generate":
            return await self._generate(request, body)
        return getattr(self, path[1:])(body)

    def model_info(self, body):
        return web.json_response({"model_path": "m", "weight_version": self.label})

    def pause_generation(self, body):
        self._running.clear()
        self.pause_mode = body["mode"]
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    def continue_generation(self, body):
        self._running.set()
        return web.json_response({"message": "Generation continued successfully.", "status": "ok"})

    def flush_cache(self, body):
        self.is_busy = False
        return web.Response(text="Cache flushed.\n")

    def update_weight_version(self, body):
        self.label = body["new_version"]
        return web.json_response({"success": True, "message": "", "new_version": self.label})

    def release_memory_occupation(self, body):
        self.is_released = True
        return web.json_response(None)

    def resume_memory_occupation(self, body):
        self.is_released = False
        return web.json_response(None)

    def abort_request(self, body):
        self._aborted.add(body["rid"])
        return web.Response(text="")

    def update_weights_from_disk(self, body):
        files = sorted(pathlib.Path(body["model_path"]).glob("*.safetensors"))
        if self.fail_update or not files:
            return web.json_response({"success": False, "message": "no weights", "num_paused_requests": 0}, status=400)
        self.loaded.append((pathlib.Path(body["model_path"]).name, files[0].read_bytes()))
        return self._updated(body)

    def server_info(self, body):
        return web.json_response({"tp_size": self.num_ranks})

    def begin_weight_update(self, body):
        if not self.has_sessions:
            return web.json_response({"detail": "Not Found"}, status=404)
        if self.is_session_open:
            message = "a weight-update session is already open; call end_weight_update() first"
            return web.json_response({"success": False, "message": message}, status=400)
        self.is_session_open = True
        return web.json_response({"success": True, "message": "Success"})

    def end_weight_update(self, body):
        assert self.is_session_open
        self.is_session_open = False
        return web.json_response({"success": True, "message": "Success"})

    def update_weights_from_tensor(self, body):
        if self.fail_update or self.has_sessions != self.is_session_open:
            return web.json_response({"success": False, "message": "no session"}, status=400)
        ranks = [TensorReader(io.BytesIO(base64.b64decode(each))).load() for each in body["serialized_named_tensors"]]
        assert len(ranks) == self.num_ranks
        self.loaded.append((body["weight_version"], dict(ranks[-1])))
        return self._updated(body)

    def _updated(self, body):
        if self.is_busy:
            message = "Weights were updated, but the cache was not flushed because requests are still running or queued"
            return web.json_response({"success": False, "message": message}, status=400)
        if not self.leave_stale:
            self.label = body["weight_version"] or self.label
        return web.json_response({"success": True, "message": "Succeeded.", "num_paused_requests": 0})

    async def _generate(self, request, body):
        self.payloads.append(body)
        if max(body["input_ids"]) >= VOCAB_SIZE:
            self.is_dead = True
            request.transport.abort()
            return web.Response()
        self._under_way += 1
        self.peak = max(self.peak, self._under_way)
        try:
            if not body["stream"]:
                parts = [part async for part in self._sample(body)]
                return web.json_response(parts[-1])
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            num_told = 0
            async for part in self._sample(body):
                if self.is_incremental:
                    about = part["meta_info"]
                    part["output_ids"] = part["output_ids"][num_told:]
                    about["output_token_logprobs"] = about["output_token_logprobs"][num_told:]
                    num_told = about["completion_tokens"]
                await response.write(f"data: {json.dumps(part)}\n\n".encode())
            await response.write(b"data: [DONE]\n\n")
            return response
        finally:
            self._under_way -= 1

    async def _sample(self, body):
        """What the reply is after each token."""
        parameters, tokens, triples, spans = body["sampling_params"], list(body["input_ids"]), [], []
        num_prompt, finish = len(tokens), None
        while finish is None:
            await self._running.wait()
            if self.token_s:
                await asyncio.sleep(self.token_s)
            if body["rid"] in self._aborted:
                finish = {"type": "abort", "message": "Aborted"}
            else:
                version = int(self.label) if self.label.isdigit() else 0
                token = next_token(tokens, version)
                tokens.append(token)
                triples.append([-0.5 - token / 100, token, None])
                if not spans or spans[-1]["version"] != self.label:
                    spans.append({"version": self.label, "start": len(triples) - 1, "end": 0})
                spans[-1]["end"] = len(triples)
                if token in parameters["stop_token_ids"] or token == self.eos:
                    finish = {"type": "stop", "matched": token}
                elif len(triples) == parameters["max_new_tokens"]:
                    finish = {"type": "length", "length": len(triples)}
            about = {
                "id": body["rid"], "finish_reason": finish, "completion_tokens": len(triples),
                "weight_version": self.label, "output_token_logprobs": list(triples),
                "prompt_tokens": num_prompt,
            }  # fmt: skip
            if finish:
                about["weight_versions"] = [dict(span) for span in spans]
            yield {"output_ids": tokens[num_prompt:], "meta_info": about}


class FaultProxy(LocalServer):
    """Passes requests on to `upstream`. `fault(path, number)` names what happens to the number-th request of a path."""

    def __init__(self, upstream, fault, port=0):
        super().__init__(port)
        self.upstream, self.fault = upstream, fault
        self.counts = {}

    async def open(self):
        self._session = aiohttp.ClientSession()

    async def close(self):
        await self._session.close()

    async def handle(self, request):
        path = "/" + request.match_info["path"]
        number = self.counts[path] = self.counts.get(path, 0) + 1
        fault = self.fault(path, number)
        if fault == "hang":
            await asyncio.sleep(60)
        if fault == "500":
            return web.Response(status=500, text="Internal Server Error")
        if fault == "503":
            return web.Response(status=503, text="starting")
        if fault == "reset":
            request.transport.abort()
            return web.Response()
        async with self._session.request(request.method, self.upstream + path, data=await request.read()) as answer:
            if fault == "cut stream":
                return await self._cut(request, answer)
            content, status, kind = await answer.read(), answer.status, answer.content_type
        if fault == "garbage":
            content = b"\xff\xfe<html>" + content[: len(content) // 2]
        if fault == "other json":
            content = b'{"output_ids": [1, 2], "meta_info": {"completion_tokens": "x"}}'
        if fault == "stale":
            content = content.replace(b'"version": "', b'"version": "old')
        if fault in ("truncated", "slow"):
            return await self._dribble(request, content, kind, fault)
        return web.Response(body=content, status=status, content_type=kind)

    async def _dribble(self, request, content, kind, fault):
        response = web.StreamResponse(headers={"Content-Type": kind, "Content-Length": str(len(content))})
        await response.prepare(request)
        for start in range(0, len(content), 40):
            if fault == "truncated" and start > len(content) // 2:
                request.transport.abort()
                return response
            await response.write(content[start : start + 40])
            await asyncio.sleep(0.02 if fault == "slow" else 0)
        return response

    async def _cut(self, request, answer):
        """Two events, then nothing more."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(4):
            await response.write(await answer.content.readline())
        request.transport.abort()
        return response
