"""Reads printed lines: image to tensor, the appliance's answer to text; the dictionary comes from the model's own metadata."""

from dataclasses import dataclass

from PIL import Image

from appliance.client.images import tensor_of
from appliance.client.sync import Appliance
from appliance.contract.errors import TheirsError
from appliance.core.serve import ctc

DICTIONARY = "character"


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
        dictionary = metadata.get("parameters", {}).get(DICTIONARY)
        if not dictionary:
            raise TheirsError("no_dictionary", f"its metadata has no `{DICTIONARY}`: it does not read text", where=model)
        self._input = str(metadata["inputs"][0]["name"])
        self._classes = ctc.alphabet(dictionary)

    def read(self, image: Image.Image) -> Reading:
        """Read one printed line. Raises: TheirsError, WorldError as `Appliance.infer`."""
        result = self._client.infer(self._model, {self._input: tensor_of(image)})
        decoded = ctc.decode(next(iter(result.outputs.values())), self._classes)[0]
        return Reading(decoded.text, decoded.confidence, result.model_version, result.mode)
