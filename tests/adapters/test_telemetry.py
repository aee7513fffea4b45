"""Nothing that runs a model keeps a telemetry database or reports to anybody."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CHILD = """
import asyncio, os
from appliance.adapters.inference.workers import Workers
from appliance.contract.vocabulary import Platform
def weights():
    fd = os.memfd_create("weights", os.MFD_CLOEXEC)
    os.write(fd, open("build/models/label-reader.onnx", "rb").read())
    return fd
async def main():
    pool = Workers(size=1, threads=1)
    await pool.load("reader", Platform.ONNX, weights)
    await pool.close()
asyncio.run(main())
"""
REFERENCE = """
from pathlib import Path
from appliance.lab.reference import Reference
Reference(Path("build/models/label-reader.onnx"))
"""


CHECK = """
import contextlib, sys
from appliance.cli.appliance import main
sys.argv = ["appliance", "check", "--config", "/nonexistent.toml"]
with contextlib.suppress(SystemExit):
    main()
import onnxruntime
onnxruntime.InferenceSession("build/models/label-reader.onnx", providers=["CPUExecutionProvider"])
"""


@pytest.mark.parametrize("script", [CHILD, REFERENCE, CHECK], ids=["inference child", "lab's reference", "the command"])
def test_loading_a_model_writes_nothing_into_the_home(script: str, tmp_path: Path) -> None:
    """Even where the environment does not switch telemetry off, loading a model leaves no file in the user's home."""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, check=True, timeout=60)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
