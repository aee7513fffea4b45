"""Who executes a LiteRT model is found by loading: a delegate that is absent, refuses, or takes nothing gives way to the next."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from appliance.adapters.inference import litert
from appliance.adapters.inference.backend import Options
from appliance.adapters.inference.litert import PLAIN, XNNPACK, LiteRtModel
from appliance.contract.errors import TheirsError

DETECTOR = (Path(__file__).parent.parent.parent / "build/models/face-detector.tflite").read_bytes()
X = np.random.default_rng(5).random((1, 128, 128, 3), dtype=np.float32)

DELEGATE = """
#include <stddef.h>
#include <stdint.h>
typedef struct delegate {
    void *data;
    int (*prepare)(void *context, struct delegate *self);
    void *from, *to, *release;
    int64_t flags;
    void *builder;
} delegate;
static int prepare(void *context, delegate *self) { return STATUS; }
static delegate only = {.prepare = prepare};
delegate *tflite_plugin_create_delegate(char **keys, char **values, size_t count, void (*report)(const char *)) { return CREATED; }
void tflite_plugin_destroy_delegate(delegate *self) {}
"""


def loaded(*libraries: str) -> LiteRtModel:
    fd = os.memfd_create("weights", os.MFD_CLOEXEC)
    try:
        os.write(fd, DETECTOR)
        model = LiteRtModel(1, Options(delegates=libraries))
        model.load(fd, len(DETECTOR))
        return model
    finally:
        os.close(fd)


def answer(model: LiteRtModel) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in model.run({model._inputs[0]["name"]: X}, tuple(model._outputs)).items()}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], str]:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    folder: Path = tmp_path_factory.mktemp("delegates")

    def made(created: str, status: str) -> str:
        library = folder / f"lib{created.strip('&')}{status}.so"
        (folder / "delegate.c").write_text(DELEGATE)
        command = ["cc", "-shared", "-fPIC", f"-DCREATED={created}", f"-DSTATUS={status}", "-o", library, folder / "delegate.c"]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(library))
        return str(library)

    return made


@pytest.mark.parametrize(("created", "status"), [("NULL", "0"), ("&only", "1"), ("&only", "0")], ids=["not made", "fails", "takes nothing"])
def test_a_delegate_that_does_not_take_the_model_gives_way(compiled: Callable[[str, str], str], created: str, status: str) -> None:
    """Whether it cannot be made, fails while it prepares, or takes no operator: XNNPACK answers, with its own bits, and says so."""
    model = loaded("libno-such-delegate.so", compiled(created, status))
    assert model.provider == XNNPACK
    right = answer(loaded())
    assert all(np.array_equal(array, right[name]) for name, array in answer(model).items())


def test_a_delegate_that_takes_a_part_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first library of the list that takes something serves."""
    asked: list[str] = []

    class Taking(Interpreter):  # type: ignore[misc]
        def __init__(self, experimental_delegates: list[str] | None = None, **rest: Any) -> None:
            self.taken = experimental_delegates == ["libsecond.so"]
            super().__init__(**rest)

        def _get_ops_details(self) -> list[dict[str, str]]:
            return [{"op_name": "DELEGATE" if self.taken else "ADD"}]

    monkeypatch.setattr(litert.ctypes, "CDLL", asked.append)
    monkeypatch.setattr(litert, "load_delegate", str)
    monkeypatch.setattr(litert, "Interpreter", Taking)
    assert loaded("libfirst.so", "libsecond.so", "libthird.so").provider == "libsecond.so"
    assert asked == ["libfirst.so", "libsecond.so"]


def test_without_xnnpack_the_built_in_kernels_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that XNNPACK breaks on is served all the same, to within rounding."""
    right = answer(loaded())

    def refusing(*, experimental_op_resolver_type: Any, **rest: Any) -> Any:
        if experimental_op_resolver_type is OpResolverType.AUTO:
            raise RuntimeError("Failed to apply XNNPACK delegate")
        return Interpreter(experimental_op_resolver_type=experimental_op_resolver_type, **rest)

    monkeypatch.setattr(litert, "Interpreter", refusing)
    model = loaded()
    assert model.provider == PLAIN
    for name, array in answer(model).items():
        np.testing.assert_allclose(array, right[name], rtol=1e-3, atol=1e-3)


def test_what_nobody_takes_is_refused_with_the_last_reason() -> None:
    """Junk is the model's fault."""
    fd = os.memfd_create("weights", os.MFD_CLOEXEC)
    os.write(fd, b"junk")
    with pytest.raises(TheirsError, match="4 bytes"):
        LiteRtModel(1, Options()).load(fd, 4)
    os.close(fd)
