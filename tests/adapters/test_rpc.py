"""The Open Inference Protocol over gRPC: Triton's own client, every bit in place, and every fault by name within bounds."""

import asyncio
import contextlib
import re
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import uvloop
from grpc import aio
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from structlog.testing import capture_logs
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import serialize_byte_tensor

from appliance.adapters.ingress.replies import STATUS
from appliance.adapters.rpc import Bounds, Rpc
from appliance.adapters.rpc.contents import FIELDS
from appliance.adapters.rpc.messages import MESSAGES, SERVICE, message
from appliance.adapters.rpc.statuses import CODES
from appliance.adapters.rpc.translation import read_infer, render
from appliance.adapters.rpc.wire import MAX_FIELDS, MAX_REST_BYTES, split
from appliance.contract.errors import OursError, TheirsError, WorldError
from appliance.contract.inference import DTYPES, Answer, Array, Promise, Tags
from appliance.contract.openinference_data import to_binary
from appliance.contract.vocabulary import Datatype, Mode, Outcome
from tests.fakes.desk import DoublingDesk

LIMIT = 1 << 20
BOUNDS = Bounds(bodies_bytes=2 * LIMIT, slow_bodies=2, prompt_s=0.05, body_timeout_s=0.4, calls=6, connections=8)
X = np.array([[0.1, -2.5, 3.0e-8, 7.0]], np.float32)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


class Served:
    """A running server with its desk, and what it told of requests that never reached the desk."""

    def __init__(self, rpc: Rpc, desk: DoublingDesk, port: int, refused: list[tuple[str, Outcome]]) -> None:
        self.rpc = rpc
        self.desk = desk
        self.port = port
        self.refused = refused
        self.channel = aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.max_send_message_length", -1)])

    def call(self, method: str, body: bytes, **more: Any) -> Any:
        """Call a method with a message as it is."""
        return self.channel.unary_unary(f"/{SERVICE}/{method}")(body, **more)

    async def infer(self, body: bytes | None = None, **more: Any) -> Any:
        """Send an infer request and return Triton's view of the answer."""
        return pb.ModelInferResponse.FromString(await self.call("ModelInfer", request() if body is None else body, **more))

    async def fault(self, body: bytes, method: str = "ModelInfer", **more: Any) -> tuple[grpc.StatusCode, str, dict[str, str]]:
        """Return the status of a call that must fail: code, text and trailing metadata."""
        with pytest.raises(aio.AioRpcError) as caught:
            async with asyncio.timeout(10):
                await self.call(method, body, **more)
        return caught.value.code(), caught.value.details() or "", dict(caught.value.trailing_metadata())  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def running(bounds: Bounds = BOUNDS, **options: Any) -> AsyncIterator[Served]:
    desk = DoublingDesk()
    refused: list[tuple[str, Outcome]] = []
    rpc = Rpc(desk, body_limit_bytes=LIMIT, bounds=bounds, refused=lambda *told: refused.append(told), **options)
    served = Served(rpc, desk, await rpc.start("127.0.0.1", 0), refused)
    try:
        yield served
    finally:
        await served.channel.close()
        await rpc.close()


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with running() as served:
        yield served


def request(array: Array = X, *, raw: bool = True, **changes: Any) -> bytes:
    """A right infer request, with changes to its one input."""
    asked = pb.ModelInferRequest(model_name=changes.pop("model", "double"), id=changes.pop("id", ""))
    for name, value in changes.pop("parameters", {}).items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(asked.parameters[name], kind, value)
    tensor = asked.inputs.add(name="x", datatype="FP32", shape=array.shape)
    if raw:
        asked.raw_input_contents.append(array.tobytes())
    else:
        tensor.contents.fp32_contents.extend(array.ravel().tolist())
    for key, value in changes.items():
        if key == "shape":
            del tensor.shape[:]
            tensor.shape.extend(value)
        elif key == "set":
            value(asked)
        else:
            setattr(tensor, key, value)
    made: bytes = asked.SerializeToString()
    return made


def same(one: Array, other: Array) -> bool:
    """Equal to the last bit, signs of zero and payloads of NaN included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.tolist() == other.tolist() if one.dtype == object else one.tobytes() == other.tobytes()


def arrays(datatype: Datatype) -> st.SearchStrategy[Array]:
    if datatype is Datatype.BYTES:
        return SHAPES.flatmap(lambda shape: hnp.arrays(object, shape, elements=st.binary(max_size=12), fill=st.nothing()))
    return hnp.arrays(DTYPES[datatype], SHAPES)


def described(descriptor: Any) -> dict[int, tuple[Any, ...]]:
    """What two descriptions of one message must agree in."""
    return {
        field.number: (
            field.name,
            field.type,
            field.is_repeated,
            field.message_type.full_name if field.message_type else "",
            field.containing_oneof.name if field.containing_oneof else "",
            field.message_type.GetOptions().map_entry if field.message_type else False,
        )
        for field in descriptor.fields
    }


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_are_tritons(name: str) -> None:
    """Each field has the name, number and type that Triton's generated code gives it; nothing is left out but an output's parameters."""
    other = pb.DESCRIPTOR.message_types_by_name[name.partition(".")[0]]
    for inner in name.split(".")[1:]:
        other = other.nested_types_by_name[inner]
    ours, theirs = described(message(name).DESCRIPTOR), described(other)
    assert ours.items() <= theirs.items()
    left_out = {theirs[number][0] for number in theirs.keys() - ours.keys()}
    assert left_out == ({"parameters", "contents"} if name == "ModelInferResponse.InferOutputTensor" else set())


@pytest.mark.parametrize("datatype", Datatype)
@given(data=st.data())
def test_raw_tensors_round_trip(datatype: Datatype, data: st.DataObject) -> None:
    """What goes out raw comes in raw with every bit in place, read and written by Triton's messages."""
    array = data.draw(arrays(datatype))
    reply = pb.ModelInferResponse.FromString(render(Answer("7", "m", "3", {"t": array}, Mode.CONSTRAINED), ()))
    output = reply.outputs[0]
    asked = pb.ModelInferRequest(model_name="m", id=reply.id, raw_input_contents=reply.raw_output_contents)
    asked.inputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
    read = read_infer(asked.SerializeToString())
    assert same(read.inputs["t"], array)
    assert (read.id, read.model) == ("7", "m")


@pytest.mark.parametrize("datatype", FIELDS)
@given(data=st.data())
def test_numbers_round_trip(datatype: Datatype, data: st.DataObject) -> None:
    """What comes as numbers of its own type is the array that was meant."""
    array = data.draw(arrays(datatype))
    asked = pb.ModelInferRequest(model_name="m")
    tensor = asked.inputs.add(name="t", datatype=datatype, shape=array.shape)
    getattr(tensor.contents, FIELDS[datatype]).extend(array.ravel().tolist())
    read = read_infer(asked.SerializeToString()).inputs["t"]
    if datatype in {Datatype.FP32, Datatype.FP64}:  # through a Python float a signalling NaN becomes quiet
        assert np.array_equal(read, array, equal_nan=True)
        assert np.array_equal(np.signbit(read)[read == read], np.signbit(array)[read == read])  # noqa: PLR0124 - not for NaN
    else:
        assert same(read, array)


def test_raw_inputs_are_views_on_the_message() -> None:
    """No copy is made of what may be megabytes."""
    body = request()
    assert np.shares_memory(read_infer(body).inputs["x"], np.frombuffer(body, np.uint8))


messages = st.builds(
    pb.ModelInferRequest,
    model_name=st.text(max_size=5),
    id=st.text(max_size=300),
    inputs=st.lists(
        st.builds(
            pb.ModelInferRequest.InferInputTensor,
            name=st.sampled_from(["x", "y", "ü"]),
            datatype=st.sampled_from([*Datatype, "", "FLOAT"]),
            shape=st.lists(st.integers(-1, 3) | st.integers(-(2**63), 2**63 - 1), max_size=4),
            contents=st.none()
            | st.builds(
                pb.InferTensorContents,
                bool_contents=st.lists(st.booleans(), max_size=2),
                int_contents=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4),
                fp32_contents=st.lists(st.floats(width=32), max_size=4),
                bytes_contents=st.lists(st.binary(max_size=3), max_size=2),
            ),
        ),
        max_size=3,
    ),
    outputs=st.lists(st.builds(pb.ModelInferRequest.InferRequestedOutputTensor, name=st.sampled_from(["y", "z"])), max_size=2),
    raw_input_contents=st.lists(st.binary(max_size=16), max_size=3),
)


@given(asked=messages)
def test_raw_tensors_are_cut_out_and_nothing_else(asked: Any) -> None:
    """The rest of a message is what protobuf makes of it without its raw tensors."""
    rest, raw = split(asked.SerializeToString())
    assert [bytes(each) for each in raw] == list(asked.raw_input_contents)
    del asked.raw_input_contents[:]
    assert pb.ModelInferRequest.FromString(rest) == asked


@settings(max_examples=300)
@given(asked=messages, at=st.integers(0, 400), junk=st.binary(max_size=6), cut=st.integers(0, 6))
def test_whatever_comes_is_read_or_refused(asked: Any, at: int, junk: bytes, cut: int) -> None:
    """Messages, whole or with bytes of them replaced, are requests or the caller's fault; nothing else happens."""
    whole = asked.SerializeToString()
    with contextlib.suppress(TheirsError):
        read_infer(whole[:at] + junk + whole[at + cut :])


@given(junk=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(junk: bytes) -> None:
    """The same for bytes that never were a message."""
    with contextlib.suppress(TheirsError):
        read_infer(junk)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"\x2a\x00" * 4_000_000, f"more than {MAX_FIELDS} fields"),
        (b"\x2a\x80\x80\x80\x01" + b"\x22\x00" * (1 << 20), f"more than {MAX_FIELDS} fields"),
        (b"\x0a\x81\x80\x80\x08" + b"a" * (MAX_REST_BYTES + 1), "beside raw_input_contents"),
    ],
    ids=["inputs", "parameters", "text"],
)
def test_a_message_that_would_swell_is_not_parsed(body: bytes, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Millions of empty fields, which take 44 times their size in memory, and large texts are refused before protobuf sees them."""
    monkeypatch.setattr("appliance.adapters.rpc.translation.message", None)
    with pytest.raises(TheirsError, match=named):
        read_infer(body)


async def test_tritons_client_works_unchanged(served: Served) -> None:
    """Triton's blocking client gets every bit of the answer, all metadata, and what made it."""

    def ask() -> None:
        with triton.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.is_model_ready("double")
            assert not client.is_model_ready("unknown")
            assert list(client.get_server_metadata().extensions) == ["parameters"]
            metadata = client.get_model_metadata("double", as_json=True)
            assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1", "4"]}]
            assert client.get_model_repository_index(as_json=True) == {"models": [{"name": "double", "version": "1", "state": "READY"}]}
            tensor = triton.InferInput("x", list(X.shape), "FP32")
            tensor.set_data_from_numpy(X)
            for compression in (None, "gzip", "deflate"):
                reply = client.infer(
                    "double", [tensor], outputs=[triton.InferRequestedOutput("y")], request_id="7", compression_algorithm=compression
                )
                assert same(reply.as_numpy("y"), X * np.float32(2))
                answer = reply.get_response()
                assert (answer.id, answer.model_version, answer.parameters["mode"].string_param) == ("7", "1", "A")

    await asyncio.to_thread(ask)


async def test_tritons_client_loads_and_unloads() -> None:
    """Where it is open, Triton's client changes what is served; an override of what was released is refused."""
    async with running(repository="everywhere") as served:

        def ask() -> None:
            with triton.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
                assert list(client.get_server_metadata().extensions) == ["parameters", "model_repository"]
                client.unload_model("double")
                assert not client.is_model_ready("double")
                index = client.get_model_repository_index().models
                assert [(each.name, each.state, each.reason) for each in index] == [("double", "UNAVAILABLE", "it is not loaded")]
                for override in ({"config": "{}"}, {"config": "{}", "files": {"file:1/model.onnx": b"evil"}}):
                    with pytest.raises(triton.InferenceServerException, match="would replace what was released") as caught:
                        client.load_model("double", **override)
                    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
                assert not client.is_model_ready("double")
                client.load_model("double")
                assert client.is_model_ready("double")

        await asyncio.to_thread(ask)
        assert served.desk.changes == [("unload", "double"), ("load", "double")]
        only_ready = pb.RepositoryIndexRequest(ready=True).SerializeToString()
        assert pb.RepositoryIndexResponse.FromString(await served.call("RepositoryIndex", only_ready)).models
        served.desk.is_loaded = False
        assert not pb.RepositoryIndexResponse.FromString(await served.call("RepositoryIndex", only_ready)).models
        unknown = pb.RepositoryModelLoadRequest(model_name="none").SerializeToString()
        assert (await served.fault(unknown, "RepositoryModelLoad"))[0] is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(("repository", "remedy"), [("socket", "use the Unix socket"), ("nowhere", "serve.repository")])
@pytest.mark.parametrize("method", ["RepositoryModelLoad", "RepositoryModelUnload"])
async def test_a_tcp_address_does_not_change_what_is_served(repository: str, remedy: str, method: str) -> None:
    """Unless it is said, nobody on the network loads or unloads a model, and the refusal says where it may be done."""
    async with running(repository=repository) as served:
        code, text, _ = await served.fault(pb.RepositoryModelLoadRequest(model_name="double").SerializeToString(), method)
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert remedy in text
        assert served.desk.changes == []


@pytest.mark.parametrize(
    ("parameters", "tags"),
    [
        ({}, Tags()),
        ({"priority": 0, "timeout": 150_000, "accept_degradation": False}, Tags(0, 0.15, accept_degradation=False)),
        ({"timeout": 0, "sequence_id": 5, "anything": "else"}, Tags()),
        (
            {
                "accept_stale": True,
                "accept_deferral": True,
                "latency_slo_ms": 80,
                "data_residency": "device",
                "max_cost_per_inference": 0.5,
            },
            Tags(accept_stale=True, accept_deferral=True, slo_s=0.08, data_residency="device", max_cost=0.5),
        ),
        ({"max_cost_per_inference": "0.25", "latency_slo_ms": "2.5", "priority": "9"}, Tags(9, slo_s=0.0025, max_cost=0.25)),
    ],
)
def test_tags_are_read(parameters: dict[str, Any], tags: Tags) -> None:
    """The same tags as over HTTP; numbers may be texts, for KServe's messages have no doubles."""
    assert read_infer(request(parameters=parameters)).tags == tags


async def test_the_answer_says_what_made_it(served: Served) -> None:
    """Mode, version, route and whatever else is known stand in the answer's parameters."""
    answer = Answer("", "m", "3", {"y": X}, Mode.MINIMAL, why="hot", confidence=0.9, route="stale", cost=0.25, age_s=2.5)
    said = pb.ModelInferResponse.FromString(render(answer, ())).parameters
    assert {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in said.items()} == {
        "mode": "C",
        "model_version": "3",
        "route": "stale",
        "why": "hot",
        "confidence": 0.9,
        "cost": 0.25,
        "stale_age_s": 2.5,
    }
    assert set((await served.infer()).parameters) == {"mode", "model_version", "route"}


def also_raw(asked: Any) -> None:
    asked.inputs[0].contents.fp32_contents.append(1.0)


def twice(asked: Any) -> None:
    asked.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    asked.raw_input_contents.append(bytes(16))


def shared(asked: Any) -> None:
    asked.inputs[0].parameters["shared_memory_region"].string_param = "r"


def shared_output(asked: Any) -> None:
    asked.outputs.add(name="y").parameters["shared_memory_region"].string_param = "r"


def classified(asked: Any) -> None:
    asked.outputs.add(name="y").parameters["classification"].int64_param = 3


def astray(asked: Any) -> None:
    asked.inputs[0].contents.int_contents.append(1)


def beyond(asked: Any) -> None:
    asked.inputs[0].datatype = "INT8"
    del asked.inputs[0].contents.fp32_contents[:]
    asked.inputs[0].contents.int_contents.extend([1, 2, 3, 128])


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (request(shape=[1, 5]), "input 'x'"),
        (request(shape=[2, 2]), "input 'x'"),
        (request(shape=[-1, 4]), "negative"),
        (request(shape=[2**40, 2**40]), "too large"),
        (request(datatype="INT32"), "expected FP32"),
        (request(datatype="FLOAT"), "'FLOAT' is unknown"),
        (request(name="z"), "'x' are missing"),
        (request(id="a" * 257), "id has 257 characters"),
        (request(set=also_raw), "contents beside raw_input_contents"),
        (request(set=twice), "2 are listed under 1 names"),
        (request(set=shared), "shared memory is not served over gRPC"),
        (request(set=shared_output), "output 'y': shared memory"),
        (request(set=classified), "classification is not served"),
        (request(raw=False, set=astray), "its data is in int_contents, FP32 belongs in fp32_contents"),
        (request(raw=False, set=beyond), "beyond the range of INT8"),
        (request(raw=False, shape=[1, 5]), "holds 5 elements, fp32_contents has 4"),
        (request(raw=False, datatype="FP16"), "FP16 travels raw only"),
        (request(parameters={"priority": 10}), "priority is outside"),
        (request(parameters={"timeout": "soon"}), "timeout"),
        (request(parameters={"data_residency": "moon"}), "data_residency"),
        (b"\x00\xff garbage", "not a protobuf message"),
        (b"\x0a\x02\xff\xff", "ModelInferRequest"),
        (b"\x0b\x0c", "wire type 3"),
        (b"\x0a\x7f", "begins 0 bytes before the end"),
        (b"\x80" * 20, "does not end"),
    ],
)
async def test_a_callers_fault_is_invalid_and_named(served: Served, body: bytes, named: str) -> None:
    """What is wrong stands in the status, and the next request is served."""
    code, text, trailing = await served.fault(body)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert named in text
    assert trailing["reason"]
    assert "retry-after-ms" not in trailing
    assert same(np.frombuffer((await served.infer()).raw_output_contents[0], np.float32), (X * np.float32(2)).ravel())


@pytest.mark.parametrize("method", ["ModelStreamInfer", "SystemSharedMemoryRegister", "ModelStatistics", "Thought\u00fcp"])
async def test_what_is_not_served_is_said_by_name(served: Served, method: str) -> None:
    """The rest of Triton's service is UNIMPLEMENTED in words; another service is gRPC's to refuse."""
    code, text, _ = await served.fault(b"", method.encode("ascii", "replace").decode().replace("?", "."))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert "is not served here" in text
    with pytest.raises(aio.AioRpcError) as caught:
        await served.channel.unary_unary("/other.Service/Method")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_what_is_not_there_is_said(served: Served) -> None:
    """Unknown models and versions are NOT_FOUND."""
    assert (await served.fault(request(model="none")))[0] is grpc.StatusCode.NOT_FOUND
    unknown = pb.ModelMetadataRequest(name="double", version="9").SerializeToString()
    assert (await served.fault(unknown, "ModelMetadata"))[0] is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("backlog_full", grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("worker_lost", grpc.StatusCode.UNAVAILABLE),
        ("draining", grpc.StatusCode.UNAVAILABLE),
        ("not_ready", grpc.StatusCode.UNAVAILABLE),
        ("deadline", grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
)
async def test_the_worlds_fault_is_retryable(served: Served, reason: str, code: grpc.StatusCode) -> None:
    """Where waiting helps, the trailing metadata say how long; the reason is the same as over HTTP."""
    served.desk.error = WorldError(reason, "it failed\nhere \u2620 \udc80", retry_after_s=0.25)
    seen, text, trailing = await served.fault(request())
    assert seen is code
    assert text == "it failed\nhere \u2620 ?"
    assert trailing["reason"] == reason
    assert trailing.get("retry-after-ms") == (None if reason == "deadline" else "250")


@pytest.mark.parametrize("error", [RuntimeError("secret detail"), OursError("output", "secret detail")])
async def test_nothing_of_the_inside_leaves(served: Served, error: Exception) -> None:
    """What was not foreseen is INTERNAL with an id under which the log has it, once."""
    served.desk.error = error
    with capture_logs() as logs:
        code, text, _ = await served.fault(request())
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in text
    assert [entry["event"] for entry in logs] == ["request_failed"]
    assert logs[0]["id"] in text


async def test_the_callers_deadline_is_the_requests_timeout(served: Served) -> None:
    """gRPC's deadline bounds the request unless a tag asks for less, and ends it at the desk too."""
    await served.infer(timeout=5.0)
    assert served.desk.asked[-1].tags.timeout_s == pytest.approx(5.0, abs=0.5)
    await served.infer(request(parameters={"timeout": 150_000}), timeout=5.0)
    assert served.desk.asked[-1].tags.timeout_s == 0.15
    await served.infer()
    assert served.desk.asked[-1].tags.timeout_s is None
    served.desk.gate = asyncio.Event()
    assert (await served.fault(request(), timeout=0.2))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(2):
        await served.desk.left.wait()


async def test_a_promise_is_an_answer_without_outputs(served: Served) -> None:
    """Who accepts deferral may be promised an answer: its parameters say by which id, why, and when to ask."""
    served.desk.promise = Promise("p-1", "no route", 2.5)
    assert (await served.infer()).outputs
    reply = await served.infer(request(parameters={"accept_deferral": True}))
    assert (reply.model_name, list(reply.outputs)) == ("double", [])
    assert (reply.parameters["promise"].string_param, reply.parameters["why"].string_param) == ("p-1", "no route")
    assert reply.parameters["retry_after_ms"].double_param == 2500


async def test_callers_are_told_apart(served: Served) -> None:
    """Requests of one connection have one caller, those of another connection another, for the backlog's fairness."""
    await served.infer()
    await served.infer()
    async with aio.insecure_channel(f"127.0.0.1:{served.port}", options=[("grpc.use_local_subchannel_pool", 1)]) as other:
        await other.unary_unary(f"/{SERVICE}/ModelInfer")(request())
    first, again, another = (each.caller for each in served.desk.asked)
    assert first == again != another
    assert first


async def test_a_cancelled_call_cancels_its_request(served: Served) -> None:
    """The desk is told, so that the request can be dropped before it costs anything; its bytes come back."""
    served.desk.gate = asyncio.Event()
    call = served.call("ModelInfer", request())
    await until(lambda: served.desk.asked)
    assert call.cancel()
    async with asyncio.timeout(2):
        await served.desk.left.wait()
    await until(lambda: served.rpc._intake.free == 2 * LIMIT)


async def until(true: Callable[[], object]) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110 - what is waited for has no event to tell of it
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
async def test_a_message_beyond_the_limit_is_refused(served: Served, compression: grpc.Compression) -> None:
    """A message larger than the limit is refused, far beyond it or not, and so is one that would become it when inflated."""
    for size in (LIMIT + 1, 64 * LIMIT):
        code, text, _ = await served.fault(bytes(size), compression=compression)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in text
    await served.infer()


async def test_all_messages_together_are_bounded(served: Served) -> None:
    """What waits for its answer counts; the call too many is told when to come back, and room returns with the answers."""
    served.desk.gate = asyncio.Event()
    large = request(parameters={"pad": "a" * (LIMIT - 200)})
    waiting = [asyncio.ensure_future(served.infer(large)) for _ in range(2)]
    await until(lambda: len(served.desk.asked) == 2)
    code, text, trailing = await served.fault(large)
    assert (code, trailing["retry-after-ms"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "1000")
    assert "all calls in flight" in text
    assert served.refused == [("-", Outcome.BACKLOG_FULL)]
    served.desk.gate.set()
    await asyncio.gather(*waiting)
    assert served.rpc._intake.free == 2 * LIMIT
    await served.infer(large)


async def test_calls_in_flight_are_bounded(served: Served) -> None:
    """One more than the bound is refused at once; the others are answered."""
    served.desk.gate = asyncio.Event()
    waiting = [asyncio.ensure_future(served.infer()) for _ in range(BOUNDS.calls)]
    await until(lambda: len(served.desk.asked) == BOUNDS.calls)
    assert (await served.fault(request()))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    served.desk.gate.set()
    await asyncio.gather(*waiting)
    await served.infer()


async def test_connections_are_bounded(served: Served) -> None:
    """One more than the bound is closed; the one that was there first is served all the while."""
    await served.infer()
    held = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(BOUNDS.connections + 4)]
    try:
        async with asyncio.timeout(5):
            for reader, _ in held[BOUNDS.connections :]:
                with contextlib.suppress(ConnectionError):
                    while await reader.read(1024):
                        pass
        await served.infer()
    finally:
        for _, writer in held:
            writer.close()


def half_a_call(size: int = 1000) -> bytes:
    """An infer call by HTTP/2's frames (RFC 9113) whose message is announced and begins, but does not end."""
    headers = b""
    for name, value in (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", f"/{SERVICE}/ModelInfer"),
        (":authority", "x"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ):
        headers += b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
    data = b"\0" + struct.pack(">I", size) + b"begin"

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload

    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, headers) + frame(0, 0, 1, data)


async def test_slow_callers_take_places_from_each_other_only(served: Served) -> None:
    """A message that does not end is given up in time; more of them than there are places are refused; others are served meanwhile."""
    writers = [(await asyncio.open_connection("127.0.0.1", served.port))[1] for _ in range(BOUNDS.slow_bodies + 1)]
    for writer in writers:
        writer.write(half_a_call())
    await until(lambda: served.refused)
    assert served.refused == [("-", Outcome.BACKLOG_FULL)]
    async with asyncio.timeout(0.2):
        await served.infer()
    await until(lambda: len(served.refused) == 3)
    assert served.refused[1:] == [("-", Outcome.MALFORMED)] * 2
    assert served.rpc._intake._slow == 0
    for writer in writers:
        writer.write(half_a_call()[:30])
        writer.close()


async def test_a_call_without_a_message_is_refused(served: Served) -> None:
    """A call that ends before its message is the caller's fault."""
    call = served.channel.stream_unary(f"/{SERVICE}/ModelInfer")()
    await call.done_writing()
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "without a message" in str(caught.value.details())


async def test_what_never_reached_the_desk_is_told(served: Served) -> None:
    """Refusals are counted by the desk's own model names: a caller's text never becomes a label."""
    await served.fault(b"garbage")
    await served.fault(request(model="thought-up", parameters={"priority": 11}))
    await served.infer()
    await served.fault(request(shape=[2, 2]))  # the desk's own refusal, which the desk counts
    assert served.refused == [("-", Outcome.MALFORMED), ("-", Outcome.MALFORMED)]


async def test_drain_answers_what_is_in_flight(served: Served) -> None:
    """On the way down, an admitted request is answered and a new one is not accepted."""
    served.desk.gate = asyncio.Event()
    waiting = asyncio.ensure_future(served.infer())
    await until(lambda: served.desk.asked)
    draining = asyncio.ensure_future(served.rpc.drain(5.0))
    await asyncio.sleep(0.1)
    assert (await served.fault(request()))[0] is grpc.StatusCode.UNAVAILABLE
    served.desk.gate.set()
    assert (await waiting).outputs
    async with asyncio.timeout(1.0):
        await draining


async def test_a_hung_desk_does_not_hold_the_shutdown(served: Served) -> None:
    """Drain ends at its bound and close soon after, though an answer never came; the caller sees its call end."""
    served.desk.gate = asyncio.Event()
    waiting = asyncio.ensure_future(served.fault(request()))
    await until(lambda: served.desk.asked)
    async with asyncio.timeout(2.0):
        await served.rpc.drain(0.2)
        await served.rpc.close()
    assert served.desk.left.is_set()
    await waiting


async def test_a_taken_port_is_named(served: Served) -> None:
    """The error says which address, and a second server never shares the first one's."""
    with pytest.raises(WorldError, match=rf"127.0.0.1:{served.port}: cannot listen.*\[serve\]"):
        await Rpc(served.desk).start("127.0.0.1", served.port)


def test_the_daemons_own_loop_serves_it() -> None:
    """uvloop, on which the daemon runs, drives gRPC's poller as well."""

    async def scenes() -> None:
        for scene in (
            test_the_callers_deadline_is_the_requests_timeout,
            test_a_cancelled_call_cancels_its_request,
            test_slow_callers_take_places_from_each_other_only,
            test_drain_answers_what_is_in_flight,
        ):
            async with running() as served:
                await scene(served)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenes())


def test_every_error_is_documented_as_it_is_answered() -> None:
    """docs/api.md has each reason that has a status of its own, over HTTP and over gRPC."""
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    rows = re.findall(r"^\| (`.*?) \| \w+ \| (\S+) \| (\S+) \| ", page, re.MULTILINE)
    documented = {reason: (status, code) for reasons, status, code in rows for reason in re.findall(r"`(\w+)`", reasons)}
    assert {reason: int(documented[reason][0]) for reason in STATUS} == STATUS
    assert {reason: documented[reason][1] for reason in CODES} == {reason: code.name for reason, code in CODES.items()}


def test_bytes_tensors_are_tritons() -> None:
    """BYTES travel as Triton's client packs them."""
    array = np.array([[b"a", b""], [b"\xff", b"long"]], object)
    assert bytes(to_binary(array)) == serialize_byte_tensor(array).item()
