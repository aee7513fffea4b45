"""`appliance infer`: asks the appliance on this machine, for images of printed lines or for tensors in .npy and .npz files."""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, UnidentifiedImageError

from appliance.client.labels import DICTIONARY, LabelReader
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
    with Appliance(server) as client:
        metadata = client.metadata(model)
        for file in files:
            row = _tensors(client, model, metadata, file) if file.suffix in {".npy", ".npz"} else _text(client, model, metadata, file)
            click.echo(json.dumps(row) if as_json else "\t".join(str(value) for value in row.values()))


def _text(client: Appliance, model: str, metadata: dict[str, Any], file: Path) -> dict[str, Any]:
    if DICTIONARY not in metadata.get("parameters", {}):
        raise TheirsError(
            "input", f"{model} does not read text (no `{DICTIONARY}` in its metadata), so an image cannot be prepared for it", where=str(file),
            remedy="give its input as .npy, or as .npz with one array for each input",
        )  # fmt: skip
    try:
        with Image.open(file) as image:
            reading = LabelReader(client, model).read(image)
    except (UnidentifiedImageError, OSError) as error:
        raise TheirsError("input", f"not an image: {error}", where=str(file)) from error
    return {
        "file": str(file),
        "text": reading.text,
        "confidence": round(reading.confidence, 4),
        "mode": reading.mode,
        "version": reading.model_version,
    }


def _tensors(client: Appliance, model: str, metadata: dict[str, Any], file: Path) -> dict[str, Any]:
    names = [str(each["name"]) for each in metadata["inputs"]]
    try:
        loaded = np.load(file, allow_pickle=False)
        inputs: dict[str, Array] = {names[0]: loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError) as error:
        raise TheirsError("input", f"not a file of arrays: {error}", where=str(file)) from error
    result = client.infer(model, inputs)
    row: dict[str, Any] = {"file": str(file)}
    for name, array in result.outputs.items():
        row[name] = {"shape": list(array.shape), "first": array.ravel()[:SHOWN].tolist()}
    return {**row, "mode": result.mode, "version": result.model_version}
