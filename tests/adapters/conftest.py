"""A software TPM for each file of tests that asks for one, and the region that knows it. A file's own `region` (MQTT, SPIFFE) goes before this one."""

import os
import shutil
from collections.abc import AsyncIterator, Iterator

import pytest

from appliance.adapters.tpm import EsysTpm
from appliance.lab import softtpm
from tests.fakes.soft_tpm import Region, Software


@pytest.fixture(scope="module")
def software() -> Iterator[Software]:
    os.environ.setdefault("TSS2_LOG", "all+none")
    made = Software()
    made.start()
    yield made
    made.cut()
    shutil.rmtree(made.state)


@pytest.fixture
async def tpm(software: Software) -> AsyncIterator[EsysTpm]:
    opened = EsysTpm(software.tcti)
    yield opened
    await opened.close()


@pytest.fixture
def region(software: Software) -> Region:
    return Region(softtpm.roots(software.state))
