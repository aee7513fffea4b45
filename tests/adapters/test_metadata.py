"""Signed metadata, both ends real: a TUF repository that signs, and a device that believes only what it should."""

import json
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tuf.api.metadata import TargetFile, Targets

from appliance.adapters.metadata import MAX_FILES, TrustedMetadata
from appliance.adapters.signing import ROLES, Repository, Terms, file_signer, file_signers
from appliance.contract.codec import encode
from appliance.contract.errors import OursError, TheirsError, WorldError
from appliance.contract.models import CompiledArtifact, EdgeConstraints, Manifest, Release
from appliance.contract.vocabulary import Platform

DAY = 86_400.0


def manifest(token: int = 1, model_id: str = "reader") -> Manifest:
    digest = f"{token:064x}"
    artifact = CompiledArtifact(size=1, sha256=digest, container_size=97, container_sha256=digest, root=digest)
    limits = EdgeConstraints(min_vram_gb=1.0, max_batch_size=8, target_latency_ms=50.0)
    return Manifest(
        model_id=model_id,
        version=f"1.{token}",
        sha256=digest,
        token=token,
        compiled_artifacts={Platform.ONNX: artifact},
        edge_constraints=limits,
        released_at=1.0,
    )


class Cloud:
    """A repository with its keys, on a clock that a test may set."""

    def __init__(self, folder: Path, terms: Terms | None = None) -> None:
        self.folder = folder
        self.terms = terms or Terms()
        self.ahead_s = 0.0
        self.signers = file_signers(folder / "keys")
        self.repository = Repository.create(folder / "repository", self.signers, self.wall, self.terms)
        self.anchor = self.repository.anchor

    def wall(self) -> float:
        return time.time() + self.ahead_s

    def fork(self, name: str) -> Repository:
        """What somebody who has the keys may do from here on, unseen by the real cloud."""
        shutil.copytree(self.folder / "repository", self.folder / name)
        return Repository.open_or_create(self.folder / name, self.signers, self.wall, self.terms)


class Device:
    """A device that remembers its trusted state, and reports a refusal only if nothing changed."""

    def __init__(self, folder: Path, anchor: bytes) -> None:
        self.folder = folder
        self.metadata = TrustedMetadata(folder, anchor)

    def tokens(self, release: Release) -> list[int]:
        return [each.token for each in self.metadata.verify(release)]

    def refusal(self, release: Release) -> str:
        before = self.state()
        with pytest.raises(TheirsError) as caught:
            self.metadata.verify(release)
        assert self.state() == before
        assert caught.value.where
        return caught.value.reason

    def state(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file()}


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path / "cloud")


@pytest.fixture
def device(tmp_path: Path, cloud: Cloud) -> Device:
    return Device(tmp_path / "device", cloud.anchor)


def changed(release: Release, path: str, change: Callable[[bytes], bytes]) -> Release:
    return Release(files={**release.files, path: change(release.files[path])})


def edited(release: Release, path: str, **fields: object) -> Release:
    """Change signed fields and keep the signatures."""

    def edit(content: bytes) -> bytes:
        parsed = json.loads(content)
        parsed["signed"].update(fields)
        return json.dumps(parsed).encode()

    return changed(release, path, edit)


def test_what_is_signed_is_on_offer(cloud: Cloud, device: Device) -> None:
    """Manifests come back as they were published, again after a restart, and an empty offer is an offer."""
    assert device.tokens(cloud.repository.release) == []
    release = cloud.repository.publish([manifest(1), manifest(2, "detector")])
    assert device.metadata.verify(release) == [manifest(2, "detector"), manifest(1)]
    assert Device(device.folder, cloud.anchor).tokens(release) == [2, 1]
    assert device.tokens(cloud.repository.refresh()) == [2, 1]
    assert device.tokens(cloud.repository.publish([manifest(3)])) == [3]
    assert device.tokens(cloud.repository.publish([])) == []


def test_release_survives_the_wire(cloud: Cloud, device: Device) -> None:
    """A release is one message of the contract, within its limit."""
    release = cloud.repository.publish([manifest(token, f"model-{token}") for token in range(100)])
    assert len(device.tokens(msgspec.json.decode(encode(release), type=Release))) == 100


def test_nothing_new_writes_nothing(cloud: Cloud, device: Device) -> None:
    """The same release again leaves the disk alone, and no scratch folder stays behind."""
    release = cloud.repository.publish([manifest(1)])
    device.tokens(release)
    (state,) = device.folder.iterdir()
    before = state.stat().st_mtime_ns
    device.tokens(release)
    assert [path.stat().st_mtime_ns for path in device.folder.iterdir()] == [before]


def test_tampered_manifest_is_refused(cloud: Cloud, device: Device) -> None:
    """A manifest with other bytes than were signed: `hash`."""
    release = cloud.repository.publish([manifest(1)])
    assert device.refusal(changed(release, "targets/reader-1.json", lambda content: content.replace(b"1.1", b"6.6"))) == "hash"
    assert device.refusal(changed(release, "targets/reader-1.json", lambda _: encode(manifest(9)))) == "hash"
    assert device.tokens(release) == [1]


def test_unsigned_metadata_is_refused(cloud: Cloud, device: Device) -> None:
    """Metadata whose signature was made over something else, or left out, and a manifest that no metadata names: `unsigned`."""
    release = cloud.repository.publish([manifest(1)])
    later = int(json.loads(release.files["metadata/timestamp.json"])["signed"]["version"]) + 1
    assert device.refusal(edited(release, "metadata/timestamp.json", version=later)) == "unsigned"

    def stripped(content: bytes) -> bytes:
        return json.dumps({**json.loads(content), "signatures": []}).encode()

    assert device.refusal(changed(release, "metadata/timestamp.json", stripped)) == "unsigned"
    extra = Release(files={**release.files, "targets/reader-7.json": encode(manifest(7))})
    assert device.refusal(extra) == "unsigned"


def test_wrong_keys_are_refused(cloud: Cloud, device: Device, tmp_path: Path) -> None:
    """A repository that is whole but another's; a timestamp key that signs targets; a new root that the old one does not know."""
    stranger = Cloud(tmp_path / "stranger")
    assert device.refusal(stranger.repository.publish([manifest(1)])) == "unsigned"
    signers = {**cloud.signers, "targets": cloud.signers["timestamp"]}
    cloud.repository.publish([manifest(1)])
    thief = cloud.fork("thief")
    thief._signers = signers
    assert device.refusal(thief.publish([manifest(2)])) == "unsigned"
    stranger.repository.rotate("root", file_signer(tmp_path / "new.pem"))
    usurper = {**cloud.repository.release.files, "metadata/2.root.json": stranger.repository.anchor}
    assert device.refusal(Release(files=usurper)) == "unsigned"


def test_older_release_is_refused(cloud: Cloud, device: Device) -> None:
    """A replayed release: `rollback`, also after a restart of the device; the newest goes on to be accepted."""
    old = cloud.repository.publish([manifest(1)])
    new = cloud.repository.publish([manifest(2)])
    assert device.tokens(new) == [2]
    assert device.refusal(old) == "rollback"
    again = Device(device.folder, cloud.anchor)
    assert again.refusal(old) == "rollback"
    assert again.tokens(new) == [2]


def test_older_snapshot_under_a_newer_timestamp_is_refused(cloud: Cloud, device: Device) -> None:
    """Somebody with the online key alone cannot bring an older offer back as today's: `rollback`."""
    cloud.repository.publish([manifest(1)])
    past = cloud.fork("past")
    assert device.tokens(cloud.repository.publish([manifest(2)])) == [2]
    for _ in range(5):
        replay = past.refresh()
    assert device.refusal(replay) == "rollback"


def test_older_targets_under_a_newer_snapshot_are_refused(cloud: Cloud, device: Device) -> None:
    """Not even with the snapshot's key too: `rollback`."""
    cloud.repository.publish([manifest(1)])
    past = cloud.fork("past")
    cloud.repository.publish([manifest(2)])
    assert device.tokens(cloud.repository.publish([manifest(3)])) == [3]
    targets = past._load(Targets, "targets")
    for _ in range(5):
        replay = past._commit(past._chain(dict(past._files), targets))
    assert device.refusal(replay) == "rollback"


def test_mixed_releases_are_refused(cloud: Cloud, device: Device) -> None:
    """Files of two genuine releases do not make a third: each names the other by hash."""
    old = cloud.repository.publish([manifest(1)])
    new = cloud.repository.publish([manifest(2)])
    for path in ("metadata/snapshot.json", "metadata/targets.json"):
        assert device.refusal(changed(new, path, lambda _, path=path: old.files[path])) == "hash"
    with_old_target = {**new.files, "targets/reader-2.json": old.files["targets/reader-1.json"]}
    assert device.refusal(Release(files=with_old_target)) == "hash"


def test_frozen_metadata_expires(cloud: Cloud, device: Device) -> None:
    """A device that is fed yesterday's timestamp notices when its term is over, whether it saw it fresh or not; a refresh heals."""
    cloud.ahead_s = -1.1 * DAY
    stale = cloud.repository.publish([manifest(1)])
    assert device.refusal(stale) == "expired"
    cloud.ahead_s = 0.0
    assert device.tokens(cloud.repository.refresh()) == [1]


def test_trusted_metadata_expires_too(cloud: Cloud, device: Device) -> None:
    """What was good when it came is refused when its term is over, although the state on disk holds it."""
    cloud.ahead_s = 1.5 - DAY
    release = cloud.repository.publish([manifest(1)])
    assert device.tokens(release) == [1]
    time.sleep(1.6)
    assert device.refusal(release) == "expired"


@pytest.mark.parametrize("role", ROLES)
def test_every_roles_term_counts(tmp_path: Path, role: str) -> None:
    """Root, targets and snapshot expire as the timestamp does."""
    cloud = Cloud(tmp_path / "cloud", Terms(**{**dict.fromkeys(ROLES, 30.0), role: 1.0}))
    cloud.ahead_s = -2 * DAY
    cloud.repository = Repository.create(tmp_path / "past", cloud.signers, cloud.wall, cloud.terms)
    device = Device(tmp_path / "device", cloud.repository.anchor)
    assert device.refusal(cloud.repository.publish([manifest(1)])) == "expired"


def test_refresh_signs_anew_what_has_spent_half_its_term(cloud: Cloud) -> None:
    """Before that only the timestamp changes; a year of refreshes never lets anything expire."""
    before = cloud.repository.publish([manifest(1)])
    after = cloud.repository.refresh()
    assert [path for path in after.files if after.files[path] != before.files.get(path)] == ["metadata/timestamp.json"]
    cloud.ahead_s = -400 * DAY
    past = Repository.create(cloud.folder / "past", cloud.signers, cloud.wall, cloud.terms)
    past.publish([manifest(1)])
    while cloud.ahead_s < 0.0:
        cloud.ahead_s += 20 * DAY
        release = past.refresh()
    assert "metadata/3.root.json" in release.files
    assert Device(cloud.folder / "old-device", past._files["metadata/1.root.json"]).tokens(release) == [1]


@pytest.mark.parametrize("roles", [["targets"], ["timestamp"], ["snapshot"], ["root"], ["root", "root", "targets"]])
def test_key_rotation_is_followed(cloud: Cloud, device: Device, tmp_path: Path, roles: list[str]) -> None:
    """A device with the first root follows any rotation, before and after a restart, and no longer believes the old keys."""
    assert device.tokens(cloud.repository.publish([manifest(1)])) == [1]
    thief = cloud.fork("thief")
    for number, role in enumerate(roles):
        cloud.repository.rotate(role, file_signer(tmp_path / f"{number}.pem"))
    assert device.tokens(cloud.repository.publish([manifest(2)])) == [2]
    again = Device(device.folder, cloud.anchor)
    assert again.tokens(cloud.repository.refresh()) == [2]
    for _ in range(9):
        stolen = thief.publish([manifest(3)])
    mixed = Release(
        files={**stolen.files, **{path: cloud.repository.release.files[path] for path in cloud.repository.release.files if "root" in path}}
    )
    if roles != ["root"]:
        assert again.refusal(mixed) == "unsigned"
        assert again.refusal(stolen) == "unsigned"


def test_new_device_starts_at_the_newest_root(cloud: Cloud, tmp_path: Path) -> None:
    """The anchor of today opens today's release, whatever roots it still carries."""
    cloud.repository.rotate("root", file_signer(tmp_path / "new.pem"))
    release = cloud.repository.publish([manifest(1)])
    assert Device(tmp_path / "young", cloud.repository.anchor).tokens(release) == [1]


@pytest.mark.parametrize("path", ["metadata/timestamp.json", "metadata/snapshot.json", "metadata/targets.json", "targets/reader-1.json"])
def test_incomplete_release_is_refused(cloud: Cloud, device: Device, path: str) -> None:
    """A file that is needed and left out: `missing`; without its manifest an offer is not quietly smaller."""
    release = cloud.repository.publish([manifest(1)])
    assert device.refusal(Release(files={name: content for name, content in release.files.items() if name != path})) == "missing"


def test_signed_nonsense_is_refused(cloud: Cloud, device: Device) -> None:
    """A signature does not make a manifest out of other JSON, nor one model out of another."""
    for content in (b"{}", b"not json", encode(manifest(5)), b"[" * 5000):
        repository = cloud.repository
        targets = repository._load(Targets, "targets")
        targets.targets = {}
        targets.targets["reader-1.json"] = TargetFile.from_data("reader-1.json", content, ["sha256"])
        targets.version += 1
        files = {path: each for path, each in repository._files.items() if path.startswith("metadata/")}
        files["targets/reader-1.json"] = content
        assert device.refusal(repository._commit(repository._chain(files, targets))) == "malformed"


@pytest.mark.parametrize(
    "name", ["metadata/../root.json", "/etc/passwd", "targets/a/b.json", "other/x.json", "targets/.json", "metadata/x.json\n"]
)
def test_names_of_a_release_are_bounded(cloud: Cloud, device: Device, name: str) -> None:
    """No file of a release is a path."""
    assert device.refusal(Release(files={**cloud.repository.release.files, name: b"{}"})) == "malformed"


def test_sizes_of_a_release_are_bounded(cloud: Cloud, device: Device) -> None:
    """Too many files and too large metadata are refused before they are parsed."""
    many = {f"targets/m-{number}.json": b"" for number in range(MAX_FILES)}
    assert device.refusal(Release(files={**cloud.repository.release.files, **many})) == "malformed"
    huge = changed(cloud.repository.release, "metadata/timestamp.json", lambda content: content + b" " * 20_000)
    assert device.refusal(huge) == "malformed"


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_mutation_is_believed(cloud: Cloud, tmp_path: Path, data: st.DataObject) -> None:
    """Any change of any file: refused with nothing changed, or (the file was not needed, the meaning is the same) the offer that was signed."""
    release = cloud.repository.release
    if "targets/reader-1.json" not in release.files:
        release = cloud.repository.publish([manifest(1)])
    path = data.draw(st.sampled_from(sorted(release.files)))
    content = release.files[path]
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 40)))
    mutated = Release(files={**release.files, path: content[:start] + data.draw(st.binary(max_size=20)) + content[end:]})
    device = Device(tmp_path / "fuzzed", cloud.anchor)
    before = device.state()
    try:
        assert device.metadata.verify(mutated) == [manifest(1)]
    except TheirsError:
        assert device.state() == before
    shutil.rmtree(tmp_path / "fuzzed")


def test_damaged_state_is_not_forgotten_quietly(cloud: Cloud, device: Device) -> None:
    """A trusted state that cannot be read stops updates with a remedy: starting anew would allow a rollback."""
    device.tokens(cloud.repository.publish([manifest(1)]))
    (state,) = device.folder.iterdir()
    state.write_bytes(b"\xc1garbage")
    with pytest.raises(WorldError) as caught:
        device.metadata.verify(cloud.repository.release)
    assert "remove the file" in caught.value.remedy


def test_versions_go_on_after_a_restart_of_the_cloud(cloud: Cloud, device: Device) -> None:
    """The repository goes on where it stopped; devices never see a version twice with other contents."""
    for token in range(1, 4):
        repository = Repository.open_or_create(cloud.folder / "repository", cloud.signers, cloud.wall)
        assert device.tokens(repository.publish([manifest(token)])) == [token]
    assert repository.release == Repository.open_or_create(cloud.folder / "repository", cloud.signers, cloud.wall).release


def test_repository_refuses_what_does_not_fit(cloud: Cloud, tmp_path: Path) -> None:
    """A second creation, foreign keys, a damaged file and a key file of another kind are told before anything is signed."""
    with pytest.raises(OursError):
        Repository.create(cloud.folder / "repository", cloud.signers, cloud.wall)
    with pytest.raises(TheirsError) as caught:
        Repository.open_or_create(cloud.folder / "repository", file_signers(tmp_path / "others"), cloud.wall)
    assert caught.value.reason == "key"
    path = cloud.folder / "repository" / "release.json"
    path.write_bytes(b"{")
    with pytest.raises(TheirsError) as caught:
        Repository.open_or_create(cloud.folder / "repository", cloud.signers, cloud.wall)
    assert caught.value.reason == "malformed"
    (tmp_path / "odd.pem").write_bytes(b"no key")
    with pytest.raises(TheirsError):
        file_signer(tmp_path / "odd.pem")


def test_keys_are_private_files(cloud: Cloud) -> None:
    """Mode 0600, Ed25519, and the same key after a restart."""
    for role in ROLES:
        path = cloud.folder / "keys" / f"{role}.pem"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert file_signer(path).public_key.keyid == cloud.signers[role].public_key.keyid
        assert file_signer(path).public_key.scheme == "ed25519"
    assert len({signer.public_key.keyid for signer in cloud.signers.values()}) == 4


def test_a_full_disk_of_the_cloud_keeps_the_offer(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that could not be kept was not made."""
    before = cloud.repository.publish([manifest(1)])
    monkeypatch.setattr("appliance.adapters.signing._replace", _full)
    for attempt in (lambda: cloud.repository.publish([manifest(2)]), cloud.repository.refresh):
        with pytest.raises(WorldError):
            attempt()
    assert cloud.repository.release == before


def _full(_path: Path, _content: bytes) -> None:
    raise OSError(28, "No space left on device")
