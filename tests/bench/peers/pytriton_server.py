"""PyTriton: batch 8, 10 ms fill wait, metrics off. `pytriton_server.py MODEL PORT`, in its own virtual environment."""

import sys

import numpy as np
import onnxruntime
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

TYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32}


def main() -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])

    @batch
    def infer(x: np.ndarray) -> list[np.ndarray]:
        return session.run(None, {"x": x})

    def tensors(specs: list[onnxruntime.NodeArg]) -> list[Tensor]:
        return [Tensor(name=spec.name, dtype=TYPES[spec.type], shape=tuple(spec.shape[1:])) for spec in specs]

    port = int(sys.argv[2])
    config = TritonConfig(http_address="127.0.0.1", http_port=port, grpc_port=port + 1, allow_metrics=False, log_verbose=0)
    with Triton(config=config) as triton:
        batcher = DynamicBatcher(max_queue_delay_microseconds=10_000)
        triton.bind(
            model_name="peer",
            infer_func=infer,
            inputs=tensors(session.get_inputs()),
            outputs=tensors(session.get_outputs()),
            config=ModelConfig(max_batch_size=8, batcher=batcher),
            strict=False,
        )
        triton.serve()


if __name__ == "__main__":
    main()
