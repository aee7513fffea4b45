"""BentoML: a batchable API that takes base64 in JSON, since its main server has no raw path for batches. The model's path is in MODEL."""

import base64
import os

import bentoml
import numpy as np
import onnxruntime


@bentoml.service(workers=1, traffic={"timeout": 60})
class Peer:
    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
        self.shape = self.session.get_inputs()[0].shape[1:]

    @bentoml.api(batchable=True, max_batch_size=8, max_latency_ms=int(os.environ.get("LATENCY_MS", "60000")))
    def infer(self, x: list[str]) -> list[str]:
        samples = [np.frombuffer(base64.b64decode(each), np.float32).reshape(self.shape) for each in x]
        return [base64.b64encode(row.tobytes()).decode() for row in self.session.run(None, {"x": np.stack(samples)})[0]]
