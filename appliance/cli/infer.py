"""`appliance infer`: asks the appliance on this machine, for images of printed lines or for tensors in .npy and .npz files."""

import json
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageOps

from appliance.client.labels import DICTIONARY, LabelReader, dictionary_of, input_names
from appliance.client.retrying import ONCE
from appliance.client.sync import Appliance
from appliance.contract.errors import TheirsError
from appliance.contract.inference import Array

SHOWN = 5


@click.command()
@click.option("--model", required=True, help="The model's name.")
@click.option("--server", default="unix:/run/appliance/api.sock", show_default=True, help="http://host:port or unix:/path.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each file.")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def infer(model: str, server: str, files: tuple[Path, ...], *, as_json: bool) -> None:
    """Ask MODEL about each of FILES."""
    failed = 0
    with Appliance(server, policy=ONCE) as client:
        metadata = client.metadata(model)
        reader = LabelReader(client, model) if dictionary_of(metadata) else None
        for file in files:
            try:
                row = _tensors(client, model, metadata, file) if file.suffix in {".npy", ".npz"} else _text(reader, model, file)
            except TheirsError as error:  # about this file; what the world does wrong ends the run
                click.echo(f"appliance: {error}", err=True)
                failed += 1
                continue
            click.echo(json.dumps(row) if as_json else "\t".join(str(value) for value in row.values()))
    if failed:
        sys.exit(1)


def _text(reader: LabelReader | None, model: str, file: Path) -> dict[str, Any]:
    if reader is None:
        raise TheirsError(
            "input", f"{model} does not read text (no `{DICTIONARY}` in its metadata), so an image cannot be prepared for it", where=str(file),
            remedy="give its input as .npy, or as .npz with one array for each input",
        )  # fmt: skip
    reading = reader.read(_image(file))
    return {
        "file": str(file),
        "text": reading.text,
        "confidence": round(reading.confidence, 4),
        "mode": reading.mode,
        "version": reading.model_version,
    }


def _image(file: Path) -> Image.Image:
    """Load the whole image, turned as its EXIF tag says."""
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:  # what Pillow raises on broken files
        raise TheirsError("input", f"not an image: {error}", where=str(file)) from error


def _tensors(client: Appliance, model: str, metadata: dict[str, Any], file: Path) -> dict[str, Any]:
    names = input_names(metadata)
    try:
        with file.open("rb") as stream:  # numpy leaves a file that it opened itself open where it is no archive
            loaded = np.load(stream, allow_pickle=False)
            inputs: dict[str, Array] = {names[0]: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise TheirsError("input", f"not a file of arrays: {error}", where=str(file)) from error
    result = client.infer(model, inputs)
    row: dict[str, Any] = {"file": str(file)}
    for name, array in result.outputs.items():
        row[name] = {"shape": list(array.shape), "first": array.ravel()[:SHOWN].tolist()}
    return {**row, "mode": result.mode, "version": result.model_version}
