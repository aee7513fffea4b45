"""Promises of the label reader, and of `appliance infer` on top of it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from appliance.cli.appliance import main
from appliance.client.labels import LabelReader
from appliance.client.sync import Appliance
from appliance.contract.errors import TheirsError
from appliance.contract.inference import Answer, Signature, TensorSpec
from appliance.contract.openinference import HEADER_LENGTH, header_length, model_metadata, parse, render
from appliance.contract.vocabulary import Datatype, Mode, Platform

CHARACTER = "a\nb\nc"
STEPS = [1, 1, 0, 4, 4, 2, 2, 0, 2]  # "a bb"
Reply = Callable[..., tuple[int, dict[str, str], bytes]]


def appliance_that_reads(character: str | None = CHARACTER, classes: int = 5, outputs: int = 1) -> Reply:
    """A server whose model `m` answers every image with `STEPS`."""
    metadata = {} if character is None else {"character": character}
    spec = TensorSpec("x", Datatype.FP32, (-1, 3, 48, -1))
    signature = Signature(Platform.ONNX, (spec,), (TensorSpec("y", Datatype.FP32, (-1, -1, classes)),), metadata)

    def reply(method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        if not path.startswith("/v2/models/m"):
            return 404, {}, b'{"error": "unknown model"}'
        if method == "GET":
            return 200, {}, model_metadata("m", ["3"], signature, 8)
        parsed = parse("m", "", header_length(headers.get(HEADER_LENGTH.lower())), body)
        probabilities = np.full((1, len(STEPS), classes), 0.05, np.float32)
        probabilities[0, range(len(STEPS)), STEPS] = 0.8
        made = {f"y{place}": probabilities for place in range(outputs)}
        answer = render(Answer("", "m", "3", made, Mode.FULL), parsed.layout)
        return 200, dict(answer[0]), b"".join(answer[1])

    return reply


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file with a small picture."""
    path = tmp_path / "label.png"
    Image.new("RGB", (100, 40), "white").save(path)
    return path


@pytest.fixture
def run(site: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run `appliance infer` as a shell would; exit code, output, errors."""

    def call(*arguments: str, server: str = site.unix) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["appliance", "infer", "--server", server, *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_an_image_is_read_with_the_models_own_dictionary(site: Any) -> None:
    """Text, confidence, version and mode come back; the tensor that was sent is the image's."""
    site.reply = appliance_that_reads()
    with Appliance(site.tcp) as client:
        reading = LabelReader(client, "m").read(Image.new("RGB", (100, 40)))
    assert (reading.text, reading.model_version, reading.mode) == ("a bb", "3", "A")
    assert reading.confidence == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"character": None}, "no `character`"),
        ({"character": ""}, "no `character`"),
        ({"classes": 6}, "the model has 6 classes, its dictionary 5"),
        ({"outputs": 2}, "a text recogniser has one"),
    ],
)
def test_a_model_that_does_not_read_is_named(site: Any, options: dict[str, Any], text: str) -> None:
    """Without a fitting dictionary and one output nothing is guessed."""
    site.reply = appliance_that_reads(**options)
    with Appliance(site.tcp) as client, pytest.raises(TheirsError, match=text):
        LabelReader(client, "m").read(Image.new("RGB", (100, 40)))


@pytest.mark.parametrize(
    "metadata", [b"{}", b'{"parameters": 3}', b'{"parameters": {"character": "a"}}', b'{"parameters": {"character": 1}, "inputs": 2}']
)
def test_a_card_that_says_little_is_refused(site: Any, metadata: bytes) -> None:
    """Metadata of another server may lack anything; that is an error of theirs."""
    site.reply = lambda *_: (200, {}, metadata)
    with Appliance(site.tcp) as client, pytest.raises(TheirsError):
        LabelReader(client, "m")


def test_infer_prints_one_line_for_each_image(site: Any, run: Any, image: Path) -> None:
    """File, text, confidence, mode and version, tab-separated, or as JSON."""
    site.reply = appliance_that_reads()
    assert run("--model", "m", str(image), str(image)) == (0, f"{image}\ta bb\t0.8\tA\t3\n" * 2, "")
    code, out, _ = run("--model", "m", "--json", str(image))
    assert (code, json.loads(out)) == (0, {"file": str(image), "text": "a bb", "confidence": 0.8, "mode": "A", "version": "3"})


def test_infer_sends_arrays_as_they_are(site: Any, run: Any, tmp_path: Path) -> None:
    """.npy is the first input, .npz names its inputs; shapes and first values are printed."""
    site.reply = appliance_that_reads(character=None)
    array = np.ones((1, 3, 48, 160), np.float32)
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", x=array)
    code, out, err = run("--model", "m", "--json", str(tmp_path / "x.npy"), str(tmp_path / "x.npz"))
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [row["y0"]["shape"] for row in rows] == [[1, 9, 5]] * 2
    sent = [body[int(headers[HEADER_LENGTH.lower()]) :] for method, _, headers, body in site.asked if method == "POST"]
    assert sent == [array.tobytes()] * 2


def test_infer_goes_on_after_a_bad_file_and_fails_at_the_end(site: Any, run: Any, image: Path, tmp_path: Path) -> None:
    """Each unreadable file is named on stderr, the others are read, and the exit code is 1."""
    site.reply = appliance_that_reads()
    bad = {
        "cut.png": image.read_bytes()[:50],
        "text.png": b"hello",
        "empty.npy": b"",
        "zip.npz": b"PK\x03\x04 no",
        "pickle.npy": pickled(tmp_path),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "words.npy", np.array(["no", "tensor"]))
    names = [*bad, "words.npy"]
    code, out, err = run("--model", "m", *(str(tmp_path / name) for name in names), str(image))
    assert (code, out) == (1, f"{image}\ta bb\t0.8\tA\t3\n")
    assert len(err.splitlines()) == len(names)
    assert all(name in err for name in names[:-1])


def pickled(folder: Path) -> bytes:
    """An array file that would run code if it were trusted."""
    np.save(folder / "objects.npy", np.array([{}], dtype=object))
    return (folder / "objects.npy").read_bytes()


def test_infer_says_that_an_image_needs_a_dictionary(site: Any, run: Any, image: Path) -> None:
    """A model that does not read text is told apart, with what to give instead."""
    site.reply = appliance_that_reads(character=None)
    code, out, err = run("--model", "m", str(image))
    assert (code, out) == (1, "")
    assert "does not read text" in err
    assert ".npz" in err


def test_infer_without_a_server_or_model_is_one_line(run: Any, image: Path) -> None:
    """Nobody there, and a model that is not there, are said in one line each."""
    for code, out, err in (run("--model", "m", str(image), server="unix:/nowhere/s"), run("--model", "other", str(image))):
        assert (code, out, len(err.splitlines())) == (1, "", 1)
        assert err.startswith("appliance: ")
