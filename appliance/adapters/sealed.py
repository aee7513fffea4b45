"""AEM1, the container of weights at rest: seal a file into it, open it into anonymous memory only.

Layout (big-endian): header of 80 B = "AEM1", u32 chunk size (1 MiB), u64 plaintext size, 32 B salt, 32 B key commitment; then the chunks, each
followed by its 16 B tag. `HKDF-SHA256(data key, salt)` gives 64 B: the AES-256-GCM key and the commitment. Facts: decision 8.

1. Chunk i has the nonce `0^7 || u32 i || last`: no chunk can be moved, doubled or left off the end (STREAM; Hoang, Reyhanitabar, Rogaway, Vizar 2015).
2. The additional data of each chunk is SHA-256(header): a changed header breaks every chunk.
3. `root` = SHA-256(header || all tags) is signed in the manifest and compared before a byte is decrypted; the tags that it covers are the ones used,
   so the file may change underneath without effect other than a refusal.
4. The commitment is compared before chunk 0: GCM alone opens under more than one key.
5. A failed `decrypt_into` leaves unauthenticated plaintext in its buffer (measured): the buffer is private, wiped, and copied out only after success.
6. All this binds outsiders only: whoever knows the data key finds other chunks with the same tags (GHASH is linear). So the first opening of a model
   in a process compares the plaintext's SHA-256 too, at the price of all the rest together (tests/bench/bench_weights.py).
7. In the same pass each chunk's AES-GMAC is taken under a key that is drawn there and never leaves the process; later openings compare that instead. A
   forgery passes with a chance below 2^-111 an attempt (65,537 blocks of 128 bits in a chunk; McGrew and Viega 2004). Decision 26.
8. The descriptor is handed out only after everything agreed, and is sealed against any change. Memory besides it does not grow with the file
   but for 16 B per MiB of tags.
"""

import fcntl
import hashlib
import hmac
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from appliance.contract.errors import OursError, TheirsError, WorldError
from appliance.contract.models import CompiledArtifact

CHUNK = 1_048_576
"""Plaintext bytes in a chunk: the size at which GCM runs from cache here (facts/tpm.md 11), and a tag costs 0.0015 %."""
TAG = 16
KEY_BYTES = 32
_MAGIC = b"AEM1"
_HEADER = struct.Struct(">4sIQ32s32s")
_NONCE = struct.Struct(">7xI?")
_INFO = b"appliance AEM1 v1"
KNOWN = 64
"""Models that are known again without SHA-256, at 3 KiB each; one more, and all are forgotten and hashed once more."""
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the chunks lie in a container of a plaintext of `size` bytes; an empty file is one empty chunk."""

    size: int

    @property
    def chunks(self) -> int:
        return max(1, -(-self.size // CHUNK))

    @property
    def container_size(self) -> int:
        return _HEADER.size + self.size + TAG * self.chunks

    def offset(self, index: int) -> int:
        return _HEADER.size + index * (CHUNK + TAG)

    def length(self, index: int) -> int:
        return min(CHUNK, self.size - index * CHUNK)

    def nonce(self, index: int) -> bytes:
        return _NONCE.pack(index, index == self.chunks - 1)


def seal(source: Path, destination: Path, data_key: bytes, salt: bytes) -> CompiledArtifact:
    """Encrypt a file into a container and describe it; `destination` appears only when it is whole and on disk.

    `data_key` and `salt` are 32 random bytes each. A pair of both must never serve two files: nonces count from 0.

    Raises: OursError (`key_size`), WorldError (`disk`).
    """
    if len(data_key) != KEY_BYTES or len(salt) != KEY_BYTES:
        raise OursError(
            "key_size", f"data key and salt have {len(data_key)} and {len(salt)} bytes, 32 and 32 are needed", where=str(destination)
        )
    partial = destination.with_name(destination.name + ".partial")
    try:
        with _opened(source, os.O_RDONLY) as plain, _opened(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as sealed:
            artifact = _seal(plain, sealed, data_key, salt)
            os.fsync(sealed)
        partial.replace(destination)
        with _opened(destination.parent, os.O_RDONLY | os.O_DIRECTORY) as folder:
            os.fsync(folder)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise WorldError(
            "disk", f"sealing failed: {error}", where=str(destination), remedy="free space there, or check the path"
        ) from error
    return artifact


def _seal(plain: int, sealed: int, data_key: bytes, salt: bytes) -> CompiledArtifact:
    layout = _Layout(os.fstat(plain).st_size)
    cipher, commitment = _derive(data_key, salt)
    header = _HEADER.pack(_MAGIC, CHUNK, layout.size, salt, commitment)
    aad = hashlib.sha256(header).digest()
    whole, root, content = hashlib.sha256(header), hashlib.sha256(header), hashlib.sha256()
    buffer, output = memoryview(bytearray(CHUNK)), memoryview(bytearray(CHUNK + TAG))
    _write_all(sealed, memoryview(header), 0)
    for index in range(layout.chunks):
        length = layout.length(index)
        _read_all(plain, buffer[:length], index * CHUNK)
        content.update(buffer[:length])
        cipher.encrypt_into(layout.nonce(index), buffer[:length], aad, output[: length + TAG])
        root.update(output[length : length + TAG])
        whole.update(output[: length + TAG])
        _write_all(sealed, output[: length + TAG], layout.offset(index))
    return CompiledArtifact(
        size=layout.size,
        sha256=content.hexdigest(),
        container_size=layout.container_size,
        container_sha256=whole.hexdigest(),
        root=root.hexdigest(),
    )


@dataclass(frozen=True, slots=True)
class _Mark:
    """What a model is known again by: a key that is nowhere else, and SHA-256 over the AES-GMAC of each chunk under it."""

    key: AESGCM
    digest: bytes


class _Witness:
    """Sees the plaintext of every chunk on its way into the memory; judges at the end whether it was the signed model (rules 6 and 7)."""

    def __init__(self, known: _Mark | None) -> None:
        self._known = known
        self._key = known.key if known else AESGCM(os.urandom(KEY_BYTES))
        self._marks, self._content = hashlib.sha256(), hashlib.sha256()

    def see(self, nonce: bytes, plain: memoryview) -> None:
        self._marks.update(self._key.encrypt(nonce, b"", plain))
        if self._known is None:
            self._content.update(plain)

    def judge(self, container: str, artifact: CompiledArtifact) -> _Mark:
        """Return the mark to know this model by. Raises: TheirsError (`tampered`)."""
        mark = _Mark(self._key, self._marks.digest())
        if self._known is None:
            seen = self._content.hexdigest()
            if not hmac.compare_digest(seen, artifact.sha256):
                raise _tampered(container, f"the model has SHA-256 {seen}, the manifest says {artifact.sha256}")
        elif not hmac.compare_digest(mark.digest, self._known.digest):
            raise _tampered(container, "another model than before with the same tags: forged by somebody who knows the data key")
        return mark


class Sealed:
    """The port `Weights` over AEM1 files and memfds; keep one for the life of a process, since it knows models again (rule 7).

    `check_plaintext=False` is for measuring: rules 6 and 7 are left out, and whoever knows the data key *and* writes to this disk has his way.
    """

    def __init__(self, *, check_plaintext: bool = True) -> None:
        self._check_plaintext = check_plaintext
        self._known: dict[CompiledArtifact, _Mark] = {}

    def open(self, container: str, artifact: CompiledArtifact, data_key: bytes) -> int:
        """Decrypt a container file into a sealed memfd and return its descriptor (close-on-exec, offset 0); the caller closes it.

        Raises: TheirsError (`tampered`, `wrong_key`), WorldError (`disk`, `memory`).
        """
        witness = _Witness(self._known.get(artifact)) if self._check_plaintext else None
        try:
            with _opened(Path(container), os.O_RDONLY) as source:
                header, tags = _inspect(source, container, artifact)
                contents = _Contents(_Layout(artifact.size), _cipher(header, container, data_key), hashlib.sha256(header).digest(), tags)
                with _anonymous(artifact.size) as memory:
                    _decrypt(source, memory, contents, witness)
                    if witness:
                        self._remember(artifact, witness.judge(container, artifact))
                    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
        except InvalidTag as error:
            raise _tampered(container, "a chunk does not match its tag") from error
        except OSError as error:
            remedy = "check the disk; the file is pulled anew if removed"
            raise WorldError("disk", f"the weights cannot be read: {error}", where=container, remedy=remedy) from error
        return memory

    def _remember(self, artifact: CompiledArtifact, mark: _Mark) -> None:
        if len(self._known) >= KNOWN and artifact not in self._known:
            self._known.clear()
        self._known[artifact] = mark


@dataclass(frozen=True, slots=True)
class _Contents:
    """A container whose header and tags agree with the signed root, and the cipher whose key it commits to."""

    layout: _Layout
    cipher: AESGCM
    aad: bytes
    tags: bytes


def _decrypt(source: int, memory: int, contents: _Contents, witness: _Witness | None) -> None:
    """Copy the plaintext to `memory`, chunk by chunk, each as the witness saw it. Raises: InvalidTag."""
    layout = contents.layout
    buffer, plain = memoryview(bytearray(CHUNK + TAG)), memoryview(bytearray(CHUNK))
    try:
        for index in range(layout.chunks):
            length, nonce = layout.length(index), layout.nonce(index)
            _read_all(source, buffer[:length], layout.offset(index))
            buffer[length : length + TAG] = contents.tags[index * TAG : (index + 1) * TAG]
            contents.cipher.decrypt_into(nonce, buffer[: length + TAG], contents.aad, plain[:length])
            if witness:
                witness.see(nonce, plain[:length])
            _store(memory, plain[:length], index * CHUNK)
    finally:
        plain[:] = bytes(CHUNK)


def _inspect(source: int, container: str, artifact: CompiledArtifact) -> tuple[bytes, bytes]:
    """Return header and all tags once they match the signed root."""
    layout = _Layout(artifact.size)
    seen = os.fstat(source).st_size
    if seen != layout.container_size or artifact.container_size != layout.container_size:
        raise _tampered(
            container, f"{seen} bytes, a model of {artifact.size} bytes needs {layout.container_size}; manifest: {artifact.container_size}"
        )
    header, tags = memoryview(bytearray(_HEADER.size)), memoryview(bytearray(TAG * layout.chunks))
    _read_all(source, header, 0)
    magic, chunk, size, _, _ = _HEADER.unpack(header)
    if (magic, chunk, size) != (_MAGIC, CHUNK, artifact.size):
        raise _tampered(container, f"header says {magic!r}, chunks of {chunk}, {size} bytes; expected {_MAGIC!r}, {CHUNK}, {artifact.size}")
    for index in range(layout.chunks):
        _read_all(source, tags[index * TAG : (index + 1) * TAG], layout.offset(index) + layout.length(index))
    root = hashlib.sha256(header)
    root.update(tags)
    if not hmac.compare_digest(root.hexdigest(), artifact.root):
        raise _tampered(container, f"root is {root.hexdigest()}, the manifest says {artifact.root}")
    return bytes(header), bytes(tags)


def _cipher(header: bytes, container: str, data_key: bytes) -> AESGCM:
    """Return the container's cipher if `data_key` is the one that it was sealed with."""
    _, _, _, salt, commitment = _HEADER.unpack(header)
    cipher, expected = _derive(data_key, salt)
    if not hmac.compare_digest(expected, commitment):
        raise TheirsError(
            "wrong_key",
            "the data key is not the one that this container was sealed with",
            where=container,
            remedy="ask the region for the key anew",
        )
    return cipher


def _derive(data_key: bytes, salt: bytes) -> tuple[AESGCM, bytes]:
    material = HKDF(algorithm=SHA256(), length=2 * KEY_BYTES, salt=salt, info=_INFO).derive(data_key)
    return AESGCM(material[:KEY_BYTES]), material[KEY_BYTES:]


def _tampered(container: str, what: str) -> TheirsError:
    return TheirsError("tampered", what, where=container, remedy="remove the file; it is pulled anew")


@contextmanager
def _anonymous(size: int) -> Iterator[int]:
    """A memfd that outlives the block only if the block succeeds."""
    try:
        memory = os.memfd_create("weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise _no_memory(size, error) from error
    try:
        yield memory
    except BaseException:
        os.close(memory)
        raise


def _store(memory: int, plain: memoryview, offset: int) -> None:
    try:
        _write_all(memory, plain, offset)
    except OSError as error:
        raise _no_memory(offset + len(plain), error) from error


def _no_memory(size: int, error: OSError) -> WorldError:
    return WorldError("memory", f"no anonymous memory for {size} bytes of weights: {error}", remedy="unload another model")


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read_all(descriptor: int, view: memoryview, offset: int) -> None:
    """Fill the whole view. Raises: OSError if the file ends before."""
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise OSError(0, f"the file ended at byte {offset} while it was read")
        view, offset = view[count:], offset + count


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
