"""Reads printed lines: image to tensor, the appliance's answer to text; the dictionary comes from the model's own metadata."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from appliance.client.images import tensor_of
from appliance.client.sync import Appliance
from appliance.contract.errors import TheirsError
from appliance.core.serve import ctc

DICTIONARY = "character"


def dictionary_of(metadata: Mapping[str, Any]) -> str | None:
    """Return the dictionary that a model's metadata carries, one symbol a line; None if the model does not read text."""
    parameters = metadata.get("parameters")
    dictionary = parameters.get(DICTIONARY) if isinstance(parameters, dict) else None
    return dictionary if isinstance(dictionary, str) and dictionary else None


def input_names(metadata: Mapping[str, Any]) -> list[str]:
    """Return the names of a model's inputs. Raises: TheirsError (`malformed`) if the metadata names none."""
    try:
        names = [str(each["name"]) for each in metadata["inputs"]]
    except (KeyError, TypeError):
        names = []
    if not names:
        raise TheirsError("malformed", "the model's metadata names no inputs", where=str(metadata.get("name", "")))
    return names


@dataclass(frozen=True, slots=True)
class Reading:
    """A text, how sure the model is of it (0..1), and who read it in which mode."""

    text: str
    confidence: float
    model_version: str
    mode: str


class LabelReader:
    """A text recogniser behind the appliance. Raises: TheirsError (`no_dictionary`) if the model carries none."""

    def __init__(self, client: Appliance, model: str) -> None:
        self._client = client
        self._model = model
        metadata = client.metadata(model)
        dictionary = dictionary_of(metadata)
        if dictionary is None:
            raise TheirsError("no_dictionary", f"its metadata has no `{DICTIONARY}`: it does not read text", where=model)
        self._input = input_names(metadata)[0]
        self._classes = ctc.alphabet(dictionary)

    def read(self, image: Image.Image) -> Reading:
        """Read one printed line. Raises: TheirsError, WorldError as `Appliance.infer`."""
        result = self._client.infer(self._model, {self._input: tensor_of(image)})
        if len(result.outputs) != 1:
            raise TheirsError("model", f"it has outputs {sorted(result.outputs)}, a text recogniser has one", where=self._model)
        decoded = ctc.decode(next(iter(result.outputs.values())), self._classes)[0]
        return Reading(decoded.text, decoded.confidence, result.model_version, result.mode)
