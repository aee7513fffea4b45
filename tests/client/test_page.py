"""The examples of docs/client.md run as they stand."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.contract.inference import Answer, Request
from appliance.contract.vocabulary import Mode

PAGE = (Path(__file__).parents[2] / "docs" / "client.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(daemon: Any, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Each block is a whole program; only the socket's path is this test's."""

    async def infer(request: Request) -> Answer:
        shape = request.inputs["x"].shape
        assert request.model == "label-reader"
        assert shape[:2] == (1, 3)
        return Answer(request.id, request.model, "1", {"y": np.zeros((1, 20, 97), np.float32)}, Mode.FULL)

    daemon.desk.infer = infer
    run: Callable[..., None] = exec
    run(EXAMPLES[number].replace("unix:/run/appliance/api.sock", daemon.url), {"__name__": "__main__"})
    assert "Traceback" not in capsys.readouterr().err


def test_the_page_has_examples() -> None:
    """A page whose blocks are no longer found would pass for ever."""
    assert len(EXAMPLES) == 6
