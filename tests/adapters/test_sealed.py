"""AEM1 on real files and memfds: whatever is changed, nothing is handed out; whatever is whole comes back bit for bit."""

import errno
import fcntl
import hashlib
import os
import struct
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.adapters import sealed
from appliance.adapters.sealed import CHUNK, TAG, Sealed, seal
from appliance.contract.errors import OursError, TheirsError, WorldError
from appliance.contract.models import CompiledArtifact

KEY = bytes(range(32))
SALT = bytes(range(32, 64))
HEADER = 80


@dataclass
class Sample:
    """A sealed file: its container, what was signed about it, and what it held."""

    path: Path
    artifact: CompiledArtifact
    plain: bytes

    def mutated(self, content: bytes) -> str:
        """Write another container beside it and return its path."""
        other = self.path.with_name("other.aem")
        other.write_bytes(content)
        return str(other)


def make(folder: Path, size: int, key: bytes = KEY, salt: bytes = SALT, name: str = "model") -> Sample:
    plain = hashlib.shake_128(struct.pack(">Q", size) + salt).digest(size)
    source = folder / f"{name}.onnx"
    source.write_bytes(plain)
    path = folder / f"{name}.aem"
    return Sample(path, seal(source, path, key, salt), plain)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return make(tmp_path_factory.mktemp("aem"), 2 * CHUNK + 777)


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names only


def refusal(path: str, artifact: CompiledArtifact, key: bytes = KEY, weights: Sealed | None = None) -> str:
    """Open, expect a refusal that leaves no descriptor behind, and return its reason."""
    before = open_files()
    with pytest.raises(TheirsError) as caught:
        (weights or Sealed()).open(path, artifact, key)
    assert open_files() == before
    assert caught.value.where == path
    return caught.value.reason


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_round_trip(tmp_path: Path, size: int) -> None:
    """Every size comes back bit for bit, the first time and later, and the overhead is 80 B and 16 B for each started MiB."""
    sample = make(tmp_path, size)
    container = sample.path.read_bytes()
    assert len(container) == sample.artifact.container_size == HEADER + size + TAG * max(1, -(-size // CHUNK))
    assert hashlib.sha256(container).hexdigest() == sample.artifact.container_sha256
    assert hashlib.sha256(sample.plain).hexdigest() == sample.artifact.sha256
    weights = Sealed()
    for _ in ("first", "later"):
        memory = weights.open(str(sample.path), sample.artifact, KEY)
        try:
            assert os.pread(memory, size + 1, 0) == sample.plain
            assert os.lseek(memory, 0, os.SEEK_CUR) == 0
        finally:
            os.close(memory)


def test_the_format_is_the_documented_one(sample: Sample) -> None:
    """Another reader, written from the documentation alone, opens the container."""
    from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415 - this reader shares nothing with the module
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF  # noqa: PLC0415

    raw = sample.path.read_bytes()
    magic, chunk, size, salt, commitment = struct.unpack(">4sIQ32s32s", raw[:HEADER])
    assert (magic, chunk, size, salt) == (b"AEM1", 1 << 20, len(sample.plain), SALT)
    material = HKDF(SHA256(), 64, salt, b"appliance AEM1 v1").derive(KEY)
    assert commitment == material[32:]
    aad, plain, tags = hashlib.sha256(raw[:HEADER]).digest(), b"", b""
    pieces = [raw[at : at + chunk + 16] for at in range(HEADER, len(raw), chunk + 16)]
    for index, piece in enumerate(pieces):
        nonce = bytes(7) + struct.pack(">I", index) + bytes([index == len(pieces) - 1])
        plain += AESGCM(material[:32]).decrypt(nonce, piece, aad)
        tags += piece[-16:]
    assert plain == sample.plain
    assert hashlib.sha256(raw[:HEADER] + tags).hexdigest() == sample.artifact.root


def test_the_memory_is_sealed_and_private(sample: Sample) -> None:
    """Nobody, not even this process, can change or resize the memory; a child does not inherit it by accident."""
    memory = Sealed().open(str(sample.path), sample.artifact, KEY)
    try:
        assert fcntl.fcntl(memory, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        with pytest.raises(PermissionError):
            os.pwrite(memory, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(memory, 0)
        with pytest.raises(PermissionError):
            os.ftruncate(memory, len(sample.plain) + 1)
        with pytest.raises(PermissionError):
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    finally:
        os.close(memory)


def _flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def _swapped(raw: bytes) -> bytes:
    stride = CHUNK + TAG
    first, second, rest = raw[HEADER : HEADER + stride], raw[HEADER + stride : HEADER + 2 * stride], raw[HEADER + 2 * stride :]
    return raw[:HEADER] + second + first + rest


def _cut(raw: bytes) -> bytes:
    return raw[: HEADER + 2 * (CHUNK + TAG)]


def _cut_and_corrected(raw: bytes) -> bytes:
    return raw[:8] + struct.pack(">Q", 2 * CHUNK) + _cut(raw)[16:]


MUTATIONS = {
    "bit flip in the plaintext's place": lambda raw: _flipped(raw, HEADER + 5),
    "bit flip in the last chunk": lambda raw: _flipped(raw, len(raw) - TAG - 1),
    "bit flip in a tag": lambda raw: _flipped(raw, len(raw) - 1),
    "chunks swapped": _swapped,
    "tail cut": _cut,
    "tail cut and the size corrected": _cut_and_corrected,
    "byte appended": lambda raw: raw + b"\0",
    "magic": lambda raw: b"AEM2" + raw[4:],
    "chunk size": lambda raw: raw[:4] + struct.pack(">I", CHUNK // 2) + raw[8:],
    "salt": lambda raw: _flipped(raw, 16),
    "commitment": lambda raw: _flipped(raw, 48),
    "empty": lambda _raw: b"",
    "header only": lambda raw: raw[:HEADER],
}


@pytest.mark.parametrize("opening", ["first", "later", "root and tags alone"])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_changed_container_is_refused(sample: Sample, mutation: str, opening: str) -> None:
    """Each change that the facts list is `tampered`, at the first opening and at later ones; root and tags suffice for it."""
    weights = Sealed(check_plaintext=opening != "root and tags alone")
    if opening == "later":
        os.close(weights.open(str(sample.path), sample.artifact, KEY))
    path = sample.mutated(MUTATIONS[mutation](sample.path.read_bytes()))
    assert refusal(path, sample.artifact, weights=weights) == "tampered"


def test_wrong_key_is_told_from_tampering(sample: Sample) -> None:
    """An authentic container under another key is `wrong_key`: the remedy is another one."""
    assert refusal(str(sample.path), sample.artifact, bytes(32)) == "wrong_key"


def test_wrong_manifest_is_refused(sample: Sample) -> None:
    """A container that is whole, but not the one that was signed, is refused by root, by hash and by size."""
    path = str(sample.path)
    assert refusal(path, msgspec.structs.replace(sample.artifact, root="0" * 64)) == "tampered"
    assert refusal(path, msgspec.structs.replace(sample.artifact, sha256="0" * 64)) == "tampered"
    assert refusal(path, msgspec.structs.replace(sample.artifact, size=sample.artifact.size - 1)) == "tampered"
    assert refusal(path, msgspec.structs.replace(sample.artifact, container_size=sample.artifact.container_size + 1)) == "tampered"


def test_shorter_file_with_shorter_manifest_is_refused(sample: Sample) -> None:
    """Even a root made over the cut file does not help: the last chunk's nonce says that it is last."""
    raw = _cut(sample.path.read_bytes())
    stride = CHUNK + TAG
    tags = b"".join(raw[HEADER + i * stride + CHUNK : HEADER + (i + 1) * stride] for i in range(2))
    for header in (raw[:HEADER], _cut_and_corrected(raw)[:HEADER]):
        artifact = msgspec.structs.replace(
            sample.artifact, size=2 * CHUNK, container_size=len(raw), root=hashlib.sha256(header + tags).hexdigest()
        )
        weights = Sealed(check_plaintext=False)
        assert refusal(sample.mutated(header + raw[HEADER:]), artifact, weights=weights) == "tampered"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_mutation_opens(tmp_path: Path, data: st.DataObject) -> None:
    """Any bytes other than the sealed ones are refused, whatever they are."""
    sample = make(tmp_path, 300)
    raw = sample.path.read_bytes()
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, len(raw)))
    changed = raw[:start] + data.draw(st.binary(max_size=64)) + raw[end:]
    if changed != raw:
        assert refusal(sample.mutated(changed), sample.artifact) == "tampered"


def test_buffers_are_wiped_after_a_refusal(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """`decrypt_into` leaves plaintext behind when a tag fails; it does not stay in our memory."""
    buffers: list[bytearray] = []

    def recorded(size: int | bytes) -> bytearray:
        buffers.append(bytearray(size))
        return buffers[-1]

    monkeypatch.setattr(sealed, "bytearray", recorded, raising=False)
    path = sample.mutated(_flipped(sample.path.read_bytes(), HEADER + 5))
    refusal(path, sample.artifact)
    plain = [buffer for buffer in buffers if len(buffer) == CHUNK]
    assert len(plain) == 1
    assert not any(plain[0])


def test_missing_file_and_full_memory_are_the_worlds_fault(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may work later is a WorldError that says which of both ran out."""
    with pytest.raises(WorldError) as caught:
        Sealed().open(str(sample.path) + ".gone", sample.artifact, KEY)
    assert caught.value.reason == "disk"

    def full(*_args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = open_files()
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(WorldError) as caught:
        Sealed().open(str(sample.path), sample.artifact, KEY)
    assert caught.value.reason == "memory"
    assert open_files() == before


def test_failed_sealing_leaves_nothing(tmp_path: Path) -> None:
    """Neither a half container nor a temporary file stays behind; a short key is our own fault."""
    source = tmp_path / "model.onnx"
    with pytest.raises(WorldError):
        seal(source, tmp_path / "model.aem", KEY, SALT)
    source.write_bytes(b"weights")
    with pytest.raises(OursError):
        seal(source, tmp_path / "model.aem", KEY[:16], SALT)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


PEAK = textwrap.dedent("""
    import os, resource, sys
    from pathlib import Path
    from appliance.adapters.sealed import Sealed, seal
    key, salt = bytes(32), bytes(32)
    with open("/dev/zero", "rb") as zero, open("model", "wb") as model:
        for _ in range(int(sys.argv[1])):
            model.write(zero.read(1 << 20))
    artifact = seal(Path("model"), Path("model.aem"), key, salt)
    weights = Sealed()
    for _ in range(2):
        os.close(weights.open("model.aem", artifact, key))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
""")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Sealing and opening 96 MiB takes no more private memory than 4 MiB does (the memfd itself aside)."""

    def peak_kib(mib: int) -> int:
        command = [sys.executable, "-c", PEAK, str(mib)]
        env = {**os.environ, "PYTHONPATH": str(Path(sealed.__file__).parents[2])}
        return int(subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout)

    assert peak_kib(96) - peak_kib(4) < 4 * 1024
