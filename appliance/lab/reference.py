"""The same reading by onnxruntime in this process: what the lab holds every served answer against.

The session's options equal those of the product's worker (one thread within an operator, one between, sequential), because
another number of threads may sum in another order and so change the last bit.
"""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from appliance.contract.errors import WorldError
from appliance.core.serve import ctc


class Reference:
    """A label recogniser loaded in this process; not for several threads at once.

    Raises: WorldError (`model`) if the file is missing, not loadable, or carries no dictionary.
    """

    def __init__(self, model_path: Path) -> None:
        """Load the model; takes about half a second."""
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # it is on by default, and is read while the library is imported
        import onnxruntime  # noqa: PLC0415 - must come after the line above

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        if not model_path.is_file():
            raise WorldError("model", "no such file", where=str(model_path), remedy="run scripts/fetch-models")
        try:
            self._session = onnxruntime.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise WorldError("model", str(error), where=str(model_path)) from error
        metadata = self._session.get_modelmeta().custom_metadata_map
        if "character" not in metadata:
            raise WorldError("model", "has no dictionary (metadata key `character`)", where=str(model_path))
        self.classes = ctc.alphabet(metadata["character"])
        self._input = self._session.get_inputs()[0].name

    def probabilities(self, tensor: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the model's output [N, T, C] for images [N, 3, 48, W], for comparison bit by bit."""
        output: npt.NDArray[np.float32] = self._session.run(None, {self._input: tensor})[0]
        return output

    def read(self, tensor: npt.NDArray[np.float32]) -> str:
        """Return the text of one image tensor [1, 3, 48, W]."""
        return ctc.decode(self.probabilities(tensor), self.classes)[0].text
