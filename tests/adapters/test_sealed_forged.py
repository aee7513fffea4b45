"""AEM1 against somebody who knows the data key and writes to the disk: GCM does not bind him, so what does is tried with real forgeries.

GHASH is a polynomial in H = AES(key, 0) (NIST SP 800-38D, 6.4): a change D of one ciphertext block is made good in the tag by the change D·H of the next.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import ECB
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.adapters import sealed
from appliance.adapters.sealed import CHUNK, TAG, Sealed, seal
from appliance.contract.errors import TheirsError
from appliance.contract.models import CompiledArtifact

KEY, SALT = bytes(range(32)), bytes(range(32, 64))
HEADER, BLOCK = 80, 16
SIZE = 2 * CHUNK + 777
BLOCKS = [CHUNK // BLOCK, CHUNK // BLOCK, 777 // BLOCK]
"""Whole blocks in each chunk."""


class Model:
    """A sealed model on a disk that the forger writes to."""

    def __init__(self, folder: Path) -> None:
        self.plain = hashlib.shake_128(b"weights").digest(SIZE)
        source, self.path = folder / "model.onnx", folder / "model.aem"
        source.write_bytes(self.plain)
        self.artifact = seal(source, self.path, KEY, SALT)
        self.raw = self.path.read_bytes()

    def forge(self, chunk: int, block: int, change: bytes) -> None:
        """Change one block of plaintext as wished, and the next one so that the chunk's tag stays."""
        at = HEADER + chunk * (CHUNK + TAG) + block * BLOCK
        pair = change + _times(change, _h(self.raw))
        forged = bytes(old ^ new for old, new in zip(self.raw[at : at + 2 * BLOCK], pair, strict=True))
        with self.path.open("r+b") as file:
            file.seek(at)
            file.write(forged)

    def restore(self) -> None:
        self.path.write_bytes(self.raw)

    def open(self, weights: Sealed, artifact: CompiledArtifact | None = None) -> bytes:
        memory = weights.open(str(self.path), artifact or self.artifact, KEY)
        try:
            return os.pread(memory, SIZE + 1, 0)
        finally:
            os.close(memory)

    def refusal(self, weights: Sealed, artifact: CompiledArtifact | None = None) -> str:
        with pytest.raises(TheirsError) as caught:
            self.open(weights, artifact)
        assert caught.value.reason == "tampered"
        return str(caught.value)


def _h(container: bytes) -> bytes:
    key = HKDF(SHA256(), 64, container[16:48], b"appliance AEM1 v1").derive(KEY)[:32]
    return Cipher(AES256(key), ECB()).encryptor().update(bytes(BLOCK))  # noqa: S305 - the subkey of GHASH is one block of it


def _times(left: bytes, right: bytes) -> bytes:
    """The product in GCM's field (NIST SP 800-38D, 6.3)."""
    x, v, product = int.from_bytes(left), int.from_bytes(right), 0
    for bit in reversed(range(128)):
        product ^= v if x >> bit & 1 else 0
        v = v >> 1 ^ (0xE1 << 120 if v & 1 else 0)
    return product.to_bytes(BLOCK)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("aem"))


@pytest.fixture
def model(shared: Model) -> Iterator[Model]:
    yield shared
    shared.restore()


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of everything that the module gives to SHA-256."""
    sizes: list[int] = []

    class Counted:
        def __init__(self, start: bytes = b"") -> None:
            self._hash = hashlib.sha256(start)

        def update(self, more: bytes | memoryview) -> None:
            sizes.append(len(more))
            self._hash.update(more)

        def __getattr__(self, name: str) -> object:
            return getattr(self._hash, name)

    monkeypatch.setattr(sealed, "hashlib", SimpleNamespace(sha256=Counted))
    return sizes


def test_root_and_tags_alone_do_not_bind_a_holder_of_the_key(model: Model) -> None:
    """The forgery is real: where rules 6 and 7 are left out, sixteen bytes of the model are what the forger wished, and no tag differs."""
    wished = b"sixteen bad ones"
    change = bytes(old ^ new for old, new in zip(model.plain[CHUNK + 160 : CHUNK + 176], wished, strict=True))
    model.forge(1, 10, change)
    opened = model.open(Sealed(check_plaintext=False))
    assert opened[CHUNK + 160 : CHUNK + 176] == wished
    assert opened[: CHUNK + 160] + opened[CHUNK + 192 :] == model.plain[: CHUNK + 160] + model.plain[CHUNK + 192 :]


def test_a_forgery_is_refused_at_the_first_opening(model: Model) -> None:
    """The hash of the plaintext tells, each time again: what was refused is not known afterwards."""
    model.forge(0, 0, b"x" * BLOCK)
    weights = Sealed()
    assert "SHA-256" in model.refusal(weights)
    assert "SHA-256" in model.refusal(weights)
    model.restore()
    assert model.open(weights) == model.plain


def test_a_forgery_is_refused_at_a_later_opening(model: Model) -> None:
    """Put under a model that has been opened before, it is refused by the mark; the model itself opens again."""
    weights = Sealed()
    assert model.open(weights) == model.plain
    model.forge(2, 3, b"x" * BLOCK)
    assert "knows the data key" in model.refusal(weights)
    model.restore()
    assert model.open(weights) == model.plain


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_forgery_opens(model: Model, data: st.DataObject) -> None:
    """Any block, anywhere, changed in any way under the same tag: neither the hash nor the mark lets it pass."""
    known = Sealed()
    model.restore()
    model.open(known)
    chunk = data.draw(st.integers(0, 2))
    block = data.draw(st.integers(0, BLOCKS[chunk] - 2))
    change = data.draw(st.binary(min_size=BLOCK, max_size=BLOCK).filter(any))
    model.forge(chunk, block, change)
    assert model.open(Sealed(check_plaintext=False)) != model.plain
    model.refusal(Sealed())
    model.refusal(known)


def test_only_the_first_opening_hashes_the_model(model: Model, hashed: list[int]) -> None:
    """Each later opening gives SHA-256 no more than tags and marks, 32 bytes a chunk."""
    weights = Sealed()
    model.open(weights)
    assert sum(hashed) >= SIZE
    hashed.clear()
    assert model.open(weights) == model.plain
    assert sum(hashed) == 3 * (TAG + TAG)


def test_another_manifest_is_another_model(model: Model) -> None:
    """To be known under one manifest says nothing under another that names the same container."""
    weights = Sealed()
    model.open(weights)
    other = msgspec.structs.replace(model.artifact, sha256="0" * 64)
    assert "SHA-256" in model.refusal(weights, other)


def test_what_is_remembered_is_bounded(model: Model, hashed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond `KNOWN` models all are forgotten, which costs one more hashing and nothing else."""
    monkeypatch.setattr(sealed, "KNOWN", 2)
    weights = Sealed()
    artifacts = [msgspec.structs.replace(model.artifact, container_sha256=str(number)) for number in range(3)]
    for artifact in artifacts:
        model.open(weights, artifact)
    hashed.clear()
    model.open(weights, artifacts[2])
    assert sum(hashed) < CHUNK
    model.open(weights, artifacts[0])
    assert sum(hashed) >= SIZE


def test_every_mark_has_a_key_of_its_own(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is 32 fresh random bytes for each model, and a mark under another key is another mark."""
    drawn: list[int] = []
    real = os.urandom

    def urandom(size: int) -> bytes:
        drawn.append(size)
        return real(size)

    monkeypatch.setattr(os, "urandom", urandom)
    first, second = Sealed(), Sealed()
    for weights in (first, second, first):
        model.open(weights)
    assert drawn == [32, 32]
    marks = [weights._known[model.artifact].digest for weights in (first, second)]
    assert marks[0] != marks[1]
