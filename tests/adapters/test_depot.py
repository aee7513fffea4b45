"""The depot on a real disk: killed, cut, filled up and lied to."""

import hashlib
import os
import random
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.adapters import depot as module
from appliance.adapters.depot import SYNC_CHUNKS, Depot
from appliance.contract.errors import OursError, TheirsError, WorldError
from appliance.contract.models import CHUNK_BYTES, CompiledArtifact


def describe(content: bytes) -> CompiledArtifact:
    digest = hashlib.sha256(content).hexdigest()
    return CompiledArtifact(size=1, sha256="0" * 64, container_size=len(content), container_sha256=digest, root="0" * 64)


def chunks(content: bytes) -> list[bytes]:
    return [content[at : at + CHUNK_BYTES] for at in range(0, len(content), CHUNK_BYTES)]


CONTENT = random.Random(7).randbytes(5 * CHUNK_BYTES + 1000)
ARTIFACT = describe(CONTENT)
HASH = ARTIFACT.container_sha256


@pytest.fixture
def depot(tmp_path: Path) -> Iterator[Depot]:
    depot = Depot(tmp_path)
    yield depot
    depot.close()


def fill(depot: Depot, content: bytes = CONTENT, artifact: CompiledArtifact = ARTIFACT) -> str:
    parts = chunks(content)
    for index in depot.missing(artifact):
        depot.put(artifact, index, parts[index])
    return depot.complete(artifact)


def test_chunks_in_any_order_make_the_file(depot: Depot) -> None:
    """What was missing shrinks with each chunk; the whole is the container, readable by its owner only, and nothing else is left."""
    order = list(range(6))
    random.Random(1).shuffle(order)
    for done, index in enumerate(order):
        assert depot.missing(ARTIFACT) == sorted(order[done:])
        depot.put(ARTIFACT, index, chunks(CONTENT)[index])
        depot.put(ARTIFACT, index, chunks(CONTENT)[index])
    path = Path(depot.complete(ARTIFACT))
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in path.parent.iterdir()] == [f"{HASH}.aem"]
    assert depot.missing(ARTIFACT) == []
    assert depot.complete(ARTIFACT) == str(path)


def test_finished_container_serves_the_next_process(depot: Depot, tmp_path: Path) -> None:
    """After a restart nothing is pulled anew, and leftovers of a cut inside `complete` are cleared."""
    path = Path(fill(depot))
    path.with_suffix(".bits").write_bytes(b"\xff")
    again = Depot(tmp_path)
    assert again.missing(ARTIFACT) == []
    assert again.complete(ARTIFACT) == str(path)
    assert not path.with_suffix(".bits").exists()


def test_rotten_container_is_missing_again(depot: Depot, tmp_path: Path) -> None:
    """A finished file whose bytes changed while nobody looked is removed and pulled anew."""
    path = Path(fill(depot))
    with path.open("r+b") as file:
        file.write(b"rot")
    assert Depot(tmp_path).missing(ARTIFACT) == list(range(6))
    assert not path.exists()


def test_tampered_chunk_fails_the_whole_and_is_forgotten(depot: Depot) -> None:
    """A wrong chunk of the right size is found by the whole hash; afterwards everything is missing."""
    parts = chunks(CONTENT)
    for index, part in enumerate(parts):
        depot.put(ARTIFACT, index, part if index != 3 else bytes(CHUNK_BYTES))
    with pytest.raises(TheirsError) as caught:
        depot.complete(ARTIFACT)
    assert caught.value.reason == "tampered"
    assert HASH in str(caught.value)
    assert depot.missing(ARTIFACT) == list(range(6))
    assert Path(fill(depot)).read_bytes() == CONTENT


@pytest.mark.parametrize(("index", "size"), [(0, CHUNK_BYTES - 1), (5, CHUNK_BYTES), (5, 999), (6, CHUNK_BYTES), (-1, CHUNK_BYTES), (0, 0)])
def test_chunk_that_does_not_fit_is_refused(depot: Depot, index: int, size: int) -> None:
    """A wrong size or index is the peer's fault and changes nothing."""
    with pytest.raises(TheirsError) as caught:
        depot.put(ARTIFACT, index, bytes(size))
    assert caught.value.reason == "chunk"
    assert depot.missing(ARTIFACT) == list(range(6))


def test_complete_before_the_last_chunk_is_our_fault(depot: Depot) -> None:
    """The chunks that are here are kept."""
    depot.put(ARTIFACT, 0, chunks(CONTENT)[0])
    with pytest.raises(OursError):
        depot.complete(ARTIFACT)
    assert depot.missing(ARTIFACT) == [1, 2, 3, 4, 5]


def test_orderly_restart_goes_on(depot: Depot, tmp_path: Path) -> None:
    """After `close` not one chunk is pulled twice."""
    depot.put(ARTIFACT, 4, chunks(CONTENT)[4])
    depot.close()
    assert Depot(tmp_path).missing(ARTIFACT) == [0, 1, 2, 3, 5]


@pytest.mark.parametrize("size", [0, 1, len(CONTENT) - 1, len(CONTENT) + 1])
def test_truncated_file_is_begun_anew(depot: Depot, tmp_path: Path, size: int) -> None:
    """Bits about a file of another size mean nothing."""
    depot.put(ARTIFACT, 4, chunks(CONTENT)[4])
    depot.close()
    os.truncate(tmp_path / "artifacts" / f"{HASH}.part", size)
    again = Depot(tmp_path)
    assert again.missing(ARTIFACT) == list(range(6))
    assert Path(fill(again)).read_bytes() == CONTENT


def test_lost_bits_cost_only_work(depot: Depot, tmp_path: Path) -> None:
    """Without its bitmap the file is pulled anew; a bitmap that lies is caught by the whole hash."""
    depot.put(ARTIFACT, 4, chunks(CONTENT)[4])
    depot.close()
    bits = tmp_path / "artifacts" / f"{HASH}.bits"
    bits.unlink()
    again = Depot(tmp_path)
    assert again.missing(ARTIFACT) == list(range(6))
    again.close()
    bits.write_bytes(b"\xff")
    liar = Depot(tmp_path)
    assert liar.missing(ARTIFACT) == []
    with pytest.raises(TheirsError):
        liar.complete(ARTIFACT)
    assert liar.missing(ARTIFACT) == list(range(6))
    liar.close()


def test_bits_reach_the_disk_after_their_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is synced before its bits are written, once for each batch: a bit on disk is never a promise."""
    content = random.Random(3).randbytes(SYNC_CHUNKS * CHUNK_BYTES)
    artifact = describe(content)
    depot = Depot(tmp_path)
    bits = tmp_path / "artifacts" / f"{artifact.container_sha256}.bits"
    seen: list[int] = []
    real = os.fdatasync

    def watched(descriptor: int) -> None:
        seen.append(bits.read_bytes().count(b"\xff"))
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", watched)
    for index, part in enumerate(chunks(content)):
        depot.put(artifact, index, part)
    assert seen == [0]
    assert bits.read_bytes() == b"\xff" * (SYNC_CHUNKS // 8)
    depot.close()


def test_drop_forgets_everything(depot: Depot) -> None:
    """A finished and a half artifact are removed; an absent one is no error."""
    path = Path(fill(depot))
    depot.drop(HASH)
    depot.drop(HASH)
    assert list(path.parent.iterdir()) == []
    depot.put(ARTIFACT, 0, chunks(CONTENT)[0])
    depot.drop(HASH)
    assert list(path.parent.iterdir()) == []
    assert depot.missing(ARTIFACT) == list(range(6))


@pytest.mark.parametrize("name", ["../" * 3 + "etc/passwd", "", "a" * 63, "A" * 64, "a" * 64 + "\n", "/" + "a" * 63, "a" * 65])
def test_only_hashes_name_artifacts(depot: Depot, name: str) -> None:
    """Nothing from the network becomes a path."""
    artifact = CompiledArtifact(size=1, sha256="", container_size=1, container_sha256=name, root="")
    for attempt in (
        lambda: depot.missing(artifact),
        lambda: depot.put(artifact, 0, b"x"),
        lambda: depot.complete(artifact),
        lambda: depot.drop(name),
    ):
        with pytest.raises(TheirsError) as caught:
            attempt()
        assert caught.value.reason == "name"


@pytest.mark.parametrize("name", ["../fence", "", ".hidden", "a/b", "a" * 65, "UP"])
def test_only_plain_names_are_state_files(depot: Depot, name: str) -> None:
    """A state file stays in its folder."""
    with pytest.raises(TheirsError):
        depot.save(name, b"x")
    with pytest.raises(TheirsError):
        depot.load(name)


def test_state_files_are_replaced_whole(depot: Depot, tmp_path: Path) -> None:
    """The last saved content is there, private, without leftovers; a file never saved is None."""
    assert depot.load("fence.json") is None
    depot.save("fence.json", b"one")
    depot.save("fence.json", b"")
    assert depot.load("fence.json") == b""
    depot.save("fence.json", b"two")
    assert Depot(tmp_path).load("fence.json") == b"two"
    folder = tmp_path / "state"
    assert [(each.name, each.stat().st_mode & 0o777) for each in folder.iterdir()] == [("fence.json", 0o600)]


CHILD = textwrap.dedent("""
    import hashlib, random, sys
    from pathlib import Path
    from appliance.adapters.depot import Depot
    from appliance.contract.models import CHUNK_BYTES, CompiledArtifact
    content = random.Random(11).randbytes(100 * CHUNK_BYTES + 5)
    digest = hashlib.sha256(content).hexdigest()
    artifact = CompiledArtifact(size=1, sha256="", container_size=len(content), container_sha256=digest, root="")
    depot = Depot(Path(sys.argv[1]))
    number = int(depot.load("count") or b"0")
    missing = depot.missing(artifact)
    print("missing", len(missing), number, flush=True)
    for index in missing:
        depot.put(artifact, index, content[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
        number += 1
        depot.save("count", b"%d" % number)
        print("put", number, flush=True)
    print("complete", depot.complete(artifact), flush=True)
""")


def test_killed_at_any_moment_it_goes_on(tmp_path: Path) -> None:
    """kill -9 again and again: at most one batch of chunks is lost each time, no state file is torn, and the whole is right in the end."""
    env = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}
    chance = random.Random(5)
    saved, left = 0, 101
    for _ in range(4):
        with subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], env=env, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            word, missing, number = child.stdout.readline().split()
            assert (word, int(missing)) == ("missing", left)
            assert int(number) >= saved
            puts = chance.randrange(33, 50) if left > 50 else chance.randrange(1, 5)
            for _put in range(puts):
                saved = int(child.stdout.readline().split()[1])
            child.kill()
        depot = Depot(tmp_path)
        before, left = left, len(depot.missing(ARTIFACT_100))
        assert before - left >= puts - SYNC_CHUNKS
        assert int(depot.load("count") or b"0") >= saved
    assert left < 50
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], env=env, check=True, capture_output=True, text=True)
    path = Path(done.stdout.splitlines()[-1].removeprefix("complete "))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == ARTIFACT_100.container_sha256


ARTIFACT_100 = describe(random.Random(11).randbytes(100 * CHUNK_BYTES + 5))


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    folder = Path(tempfile.mkdtemp(prefix="ap-", dir="/tmp"))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=False, capture_output=True, text=True)
    if mounted.returncode != 0:
        folder.rmdir()
        pytest.skip(f"mount refused: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
    folder.rmdir()


def test_full_disk_is_said_at_the_first_chunk(small_disk: Path) -> None:
    """The error names path and free bytes, nothing is left behind, and with space the same depot goes on."""
    depot = Depot(small_disk)
    content = random.Random(2).randbytes(9 * CHUNK_BYTES)
    artifact = describe(content)
    with pytest.raises(WorldError) as caught:
        depot.missing(artifact)
    assert caught.value.reason == "disk"
    assert artifact.container_sha256 in caught.value.where
    assert "bytes are free" in caught.value.what
    assert list((small_disk / "artifacts").iterdir()) == []
    depot.save("fence.json", b"small things still fit")
    with pytest.raises(WorldError):
        depot.save("fence.json", bytes(4_000_000))
    assert depot.load("fence.json") == b"small things still fit"
    assert [each.name for each in (small_disk / "state").iterdir()] == ["fence.json"]
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert Path(fill(depot, content, artifact)).read_bytes() == content
    depot.close()
