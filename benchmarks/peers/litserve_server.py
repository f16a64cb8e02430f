"""LitServe with the same network behind the same Pillow preprocessing; run by ../serve.py.

Batches form as LitServe forms them: up to `--batch` images, waiting for others at most `--wait` seconds.
"""

from __future__ import annotations

import argparse
import base64
import io

import litserve
import numpy as np
import onnxruntime
from PIL import Image


class Features(litserve.LitAPI):  # type: ignore[misc]
    def __init__(self, onnx: str, side: int, mean: list[float], std: list[float], **options: object) -> None:
        super().__init__(**options)
        self.onnx, self.side, self.mean, self.std = onnx, side, mean, std

    def setup(self, device: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.onnx, options, providers=["CPUExecutionProvider"])

    def decode_request(self, request: dict[str, str]) -> np.ndarray:
        image = Image.open(io.BytesIO(base64.b64decode(request["image"]))).convert("RGB")
        scale = self.side / min(image.size)
        image = image.resize((max(self.side, int(image.width * scale)), max(self.side, int(image.height * scale))))
        left, top = (image.width - self.side) // 2, (image.height - self.side) // 2
        values = np.asarray(image.crop((left, top, left + self.side, top + self.side)), np.float32) / 255
        return ((values - self.mean) / self.std).astype(np.float32).transpose(2, 0, 1)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        values = np.ascontiguousarray(x if x.ndim == 4 else x[None])
        features: np.ndarray = self.session.run(None, {"pixel_values": values})[0]
        return features

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict[str, object]:
        return {"embedding": output.ravel().tolist()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--onnx", required=True)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--mean", type=float, nargs=3, required=True)
    parser.add_argument("--std", type=float, nargs=3, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--wait", type=float, default=0.005)
    options = parser.parse_args()
    batched = {"max_batch_size": options.batch, "batch_timeout": options.wait} if options.batch > 1 else {}
    api = Features(options.onnx, options.side, options.mean, options.std, api_path="/embed", **batched)
    litserve.LitServer(api, accelerator="cpu", workers_per_device=1).run(
        host="127.0.0.1", port=options.port, generate_client_file=False, log_level="warning"
    )
