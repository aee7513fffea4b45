"""From a folder with a model to a device's verified, opened weights: publishing with the real repository, depot and container."""

import base64
import hashlib
import json
import os
import stat
import time
from pathlib import Path

import pytest

from appliance.adapters.depot import Depot
from appliance.adapters.metadata import TrustedMetadata
from appliance.adapters.sealed import Sealed, seal
from appliance.adapters.signing import Repository, file_signers
from appliance.cloud.publishing import Publisher
from appliance.contract.errors import ApplianceError, TheirsError, WorldError
from appliance.contract.models import CHUNK_BYTES, CompiledArtifact, Manifest, RegionKeyAsk
from appliance.contract.vocabulary import Mode, Platform
from appliance.core.trust.envelope import region_public, unwrap_for_region

CARD = """\
model_id = "label-reader"
version = "1.0"
min_vram_gb = 1
max_batch_size = 16
target_latency_ms = 40.0
"""
ONNX = hashlib.shake_128(b"onnx").digest(700_000)
TFLITE = hashlib.shake_128(b"tflite").digest(5)
PRIVATE = bytes(range(32))


class Cloud:
    """A cloud on disk that can be restarted; `sealings` counts what was encrypted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = folder / "models"
        self.sealings = 0
        self.start()
        self.device = TrustedMetadata(folder / "device", self.repository.anchor)

    def start(self) -> None:
        self.repository = Repository.open_or_create(self.folder / "repository", file_signers(self.folder / "keys"), time.time)
        self.publisher = Publisher(
            models=self.models,
            containers=self.folder / "containers",
            state=Depot(self.folder / "state"),
            repository=self.repository,
            seal=self.seal,
            wall=lambda: 1000.0,
        )

    def seal(self, source: Path, destination: Path, data_key: bytes, salt: bytes) -> CompiledArtifact:
        self.sealings += 1
        return seal(source, destination, data_key, salt)

    def write(self, name: str = "reader", card: str = CARD, **files: bytes) -> Path:
        folder = self.models / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.toml").write_text(card)
        for suffix, content in files.items():
            (folder / f"model.{suffix}").write_bytes(content)
        return folder

    def offer(self) -> list[Manifest]:
        """Publish, and return what a device believes of it."""
        return self.device.verify(self.publisher.publish_all())

    def refusal(self) -> ApplianceError:
        """Publish, expect a refusal that leaves the offer as it was, and return it."""
        before = self.repository.release
        with pytest.raises(ApplianceError) as caught:
            self.publisher.publish_all()
        assert self.repository.release == before
        return caught.value


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def test_the_way_of_the_weights(cloud: Cloud, tmp_path: Path) -> None:
    """Published, verified, pulled chunk by chunk, key fetched, opened: the model is the one in the folder, on both platforms."""
    cloud.write(onnx=ONNX, tflite=TFLITE)
    (manifest,) = cloud.offer()
    assert (manifest.model_id, manifest.version, manifest.token, manifest.released_at) == ("label-reader", "1.0", 1, 1000.0)
    assert manifest.edge_constraints.min_vram_gb == 1.0
    assert manifest.sha256 == hashlib.sha256(ONNX).hexdigest()
    depot = Depot(tmp_path / "device-depot")
    for platform, plain in ((Platform.ONNX, ONNX), (Platform.LITERT, TFLITE)):
        artifact = manifest.compiled_artifacts[platform]
        for index in depot.missing(artifact):
            depot.put(artifact, index, cloud.publisher.chunk(artifact.container_sha256, index))
        ask = RegionKeyAsk(artifact=artifact.container_sha256, public=region_public(PRIVATE))
        data_key = unwrap_for_region(cloud.publisher.region_key(ask), artifact.container_sha256, PRIVATE)
        memory = Sealed().open(depot.complete(artifact), artifact, data_key)
        assert os.pread(memory, len(plain) + 1, 0) == plain
        os.close(memory)
    depot.close()


def test_the_same_again_changes_nothing(cloud: Cloud) -> None:
    """Neither a second request nor a restart seals, spends a token or makes new keys."""
    cloud.write(onnx=ONNX)
    first = cloud.offer()
    assert cloud.offer() == first
    cloud.start()
    assert cloud.offer() == first
    assert cloud.sealings == 1


def test_tokens_only_grow(cloud: Cloud) -> None:
    """Over new versions, other models and restarts; going back to an older version offers it with its old token, for devices to refuse."""
    cloud.write(onnx=ONNX)
    cloud.offer()
    cloud.write(card=CARD.replace("1.0", "1.1"), onnx=TFLITE)
    assert [each.token for each in cloud.offer()] == [2]
    cloud.start()
    cloud.write("detector", CARD.replace("label-reader", "detector"), tflite=TFLITE)
    assert {each.model_id: each.token for each in cloud.offer()} == {"label-reader": 2, "detector": 3}
    cloud.write(onnx=ONNX)
    assert {each.model_id: each.token for each in cloud.offer()} == {"label-reader": 1, "detector": 3}


def test_each_artifact_has_its_own_key(cloud: Cloud) -> None:
    """The same bytes twice are two containers under two keys, and the plaintext is in none of the cloud's other files."""
    cloud.write(onnx=ONNX)
    cloud.write("copy", CARD.replace("label-reader", "copy"), onnx=ONNX)
    artifacts = [each.compiled_artifacts[Platform.ONNX] for each in cloud.offer()]
    assert artifacts[0].sha256 == artifacts[1].sha256
    assert artifacts[0].container_sha256 != artifacts[1].container_sha256
    keys = {
        unwrap_for_region(
            cloud.publisher.region_key(RegionKeyAsk(artifact=each.container_sha256, public=region_public(PRIVATE))),
            each.container_sha256,
            PRIVATE,
        )
        for each in artifacts
    }
    assert len(keys) == 2
    stored = [path for path in cloud.folder.rglob("*") if path.is_file() and path.suffix != ".onnx"]
    assert not [path for path in stored if ONNX[:64] in path.read_bytes() or ONNX[-64:] in path.read_bytes()]
    encodings = [form for key in keys for form in (key, key.hex().encode(), base64.b64encode(key))]
    holders = {path.name for path in stored if any(form in path.read_bytes() for form in encodings)}
    assert holders == {"published.json"}
    assert stat.S_IMODE((cloud.folder / "state" / "state" / "published.json").stat().st_mode) == 0o600


def test_removed_model_is_no_longer_on_offer(cloud: Cloud) -> None:
    """Its chunks and key are still served to devices that are on the way."""
    folder = cloud.write(onnx=ONNX)
    (manifest,) = cloud.offer()
    (folder / "model.toml").unlink()
    assert cloud.offer() == []
    artifact = manifest.compiled_artifacts[Platform.ONNX].container_sha256
    assert len(cloud.publisher.chunk(artifact, 0)) == CHUNK_BYTES


def test_a_version_names_one_content(cloud: Cloud) -> None:
    """Other bytes, another platform or other limits under a published version are refused with what to do."""
    folder = cloud.write(onnx=ONNX)
    cloud.offer()
    cloud.write(onnx=ONNX[:-1])
    assert cloud.refusal().reason == "version_reused"
    cloud.write(onnx=ONNX, tflite=TFLITE)
    assert cloud.refusal().reason == "version_reused"
    (folder / "model.tflite").unlink()
    cloud.write(card=CARD.replace("16", "32"))
    error = cloud.refusal()
    assert (error.reason, error.remedy, error.where) == ("version_reused", "give it a new version", str(folder / "model.toml"))
    cloud.write()
    assert len(cloud.offer()) == 1


MISTAKES = {
    "unknown key": (CARD + 'colour = "red"\n', ":6: ", "unknown field `colour`"),
    "wrong type": (CARD.replace("16", '"many"'), ":4: ", "Expected `int`, got `str`"),
    "out of range": (CARD.replace("= 16", "= 0"), ":4: ", ">= 1"),
    "negative": (CARD.replace("40.0", "-1.0"), ":5: ", "> 0"),
    "missing key": (CARD.replace('version = "1.0"\n', ""), "model.toml: ", "missing required field `version`"),
    "path as id": (CARD.replace("label-reader", "../reader"), ":1: ", "$.model_id"),
    "not TOML": (CARD.replace('"1.0"', "1.0.0"), "model.toml: ", "line 2"),
    "not text": (None, "model.toml: ", "utf-8"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_card_are_named(cloud: Cloud, mistake: str) -> None:
    """File, line and field stand in the error, and the good model beside it is not published either."""
    text, place, what = MISTAKES[mistake]
    cloud.write("another", CARD.replace("label-reader", "another"), onnx=TFLITE)
    folder = cloud.write(onnx=ONNX)
    (folder / "model.toml").write_bytes(b"\xff\xfe" if text is None else text.encode())
    error = cloud.refusal()
    assert error.reason == "malformed"
    assert place in str(error)
    assert what in str(error)
    assert str(error).startswith(str(folder / "model.toml"))
    assert cloud.sealings == 0


def test_folders_that_are_no_models_are_named(cloud: Cloud) -> None:
    """No model file, two for one platform, one id in two folders."""
    folder = cloud.write()
    assert "add one of .onnx, .tflite" in str(cloud.refusal())
    (folder / "a.onnx").write_bytes(ONNX)
    (folder / "b.onnx").write_bytes(ONNX)
    assert "a.onnx and b.onnx" in str(cloud.refusal())
    (folder / "b.onnx").unlink()
    cloud.write("twin", onnx=ONNX)
    assert str(folder / "model.toml") in str(cloud.refusal())


def test_only_what_was_published_is_served(cloud: Cloud) -> None:
    """Unknown hashes, paths and indices beyond the end are the asker's fault."""
    cloud.write(onnx=ONNX)
    (manifest,) = cloud.offer()
    artifact = manifest.compiled_artifacts[Platform.ONNX]
    for name in ("0" * 64, "../state/published", "", artifact.sha256):
        with pytest.raises(TheirsError) as caught:
            cloud.publisher.chunk(name, 0)
        assert caught.value.reason == "unknown_artifact"
        with pytest.raises(TheirsError) as caught:
            cloud.publisher.region_key(RegionKeyAsk(artifact=name, public=region_public(PRIVATE)))
        assert caught.value.reason == "unknown_artifact"
    for index in (-1, 3, 2**40):
        with pytest.raises(TheirsError) as caught:
            cloud.publisher.chunk(artifact.container_sha256, index)
        assert caught.value.reason == "chunk"
    assert len(cloud.publisher.chunk(artifact.container_sha256, 2)) == artifact.container_size - 2 * CHUNK_BYTES


def test_lost_container_is_the_worlds_fault(cloud: Cloud) -> None:
    """A container that was cut or removed is never served short."""
    cloud.write(onnx=ONNX)
    (manifest,) = cloud.offer()
    name = manifest.compiled_artifacts[Platform.ONNX].container_sha256
    path = cloud.folder / "containers" / f"{name}.aem"
    os.truncate(path, 10)
    with pytest.raises(WorldError):
        cloud.publisher.chunk(name, 0)
    path.unlink()
    with pytest.raises(WorldError):
        cloud.publisher.chunk(name, 0)


def test_file_that_changes_while_it_is_sealed_is_not_published(cloud: Cloud) -> None:
    """A model that is still being copied into the folder: refused, and good a moment later."""
    folder = cloud.write(onnx=ONNX)
    real = cloud.seal

    def meddling(source: Path, destination: Path, data_key: bytes, salt: bytes) -> CompiledArtifact:
        (folder / "model.onnx").write_bytes(TFLITE)
        return real(source, destination, data_key, salt)

    cloud.publisher._seal = meddling
    assert cloud.refusal().reason == "model"
    cloud.publisher._seal = real
    assert [each.sha256 for each in cloud.offer()] == [hashlib.sha256(TFLITE).hexdigest()]


def test_damaged_state_stops_the_cloud(cloud: Cloud) -> None:
    """It holds the keys: going on with an empty one would lose them for good."""
    Depot(cloud.folder / "state").save("published.json", b"{")
    with pytest.raises(TheirsError) as caught:
        cloud.start()
    assert "backup" in caught.value.remedy


BUNDLE = (
    CARD
    + """\
accuracy = 0.96
latency_ms = 20.0
memory_bytes = 20_000_000

[example_shapes]
x = [3, 48, 320]

[variants.B]
files = ["b.onnx", "b.tflite"]
accuracy = 0.95
how = "blocks"

[variants.D]
files = ["features.onnx"]
head = "head.onnx"
latency_ms = 18.0
memory_bytes = 15_000_000

[refused]
C = "worse and not cheaper"

[measured]
metric = "text"
samples = 200
machine = "one"
onnxruntime = "1.32.0"
"""
)
PARTS = {"b.onnx": b"B onnx" * 99, "b.tflite": b"B tflite" * 99, "features.onnx": b"D features" * 99, "head.onnx": b"D head" * 99}


def write_bundle(cloud: Cloud, card: str = BUNDLE, **parts: bytes) -> Path:
    folder = cloud.write(card=card, onnx=ONNX)
    for name, content in {**PARTS, **parts}.items():
        (folder / name).write_bytes(content)
    return folder


def opened(cloud: Cloud, artifact: CompiledArtifact, folder: Path) -> bytes:
    """Pull, unwrap and decrypt an artifact as a device does."""
    depot = Depot(folder)
    for index in depot.missing(artifact):
        depot.put(artifact, index, cloud.publisher.chunk(artifact.container_sha256, index))
    ask = RegionKeyAsk(artifact=artifact.container_sha256, public=region_public(PRIVATE))
    memory = Sealed().open(
        depot.complete(artifact), artifact, unwrap_for_region(cloud.publisher.region_key(ask), artifact.container_sha256, PRIVATE)
    )
    content = os.pread(memory, artifact.size + 1, 0)
    os.close(memory)
    depot.close()
    return content


def test_a_bundle_is_published_whole(cloud: Cloud, tmp_path: Path) -> None:
    """Every variant's file is sealed as the full model's is, and stands in the signed manifest with what was measured of it."""
    write_bundle(cloud)
    (manifest,) = cloud.offer()
    assert (manifest.accuracy, manifest.latency_ms, manifest.memory_bytes) == (0.96, 20.0, 20_000_000)
    assert manifest.example_shapes == {"x": [3, 48, 320]}
    assert set(manifest.compiled_artifacts) == {Platform.ONNX}
    assert set(manifest.variants) == {Mode.CONSTRAINED, Mode.CLOUD}
    constrained, split = manifest.variants[Mode.CONSTRAINED], manifest.variants[Mode.CLOUD]
    assert (constrained.accuracy, constrained.latency_ms, constrained.how) == (0.95, None, "blocks")
    assert (split.accuracy, split.latency_ms, split.memory_bytes) == (None, 18.0, 15_000_000)
    for number, (artifact, plain) in enumerate(
        (
            (manifest.compiled_artifacts[Platform.ONNX], ONNX),
            (constrained.compiled_artifacts[Platform.ONNX], PARTS["b.onnx"]),
            (constrained.compiled_artifacts[Platform.LITERT], PARTS["b.tflite"]),
            (split.compiled_artifacts[Platform.ONNX], PARTS["features.onnx"]),
        )
    ):
        assert opened(cloud, artifact, tmp_path / f"device-{number}") == plain
    assert cloud.sealings == 4


def test_the_head_stays_in_the_cloud(cloud: Cloud) -> None:
    """It is no artifact, and the next version may have another one only as a version of its own features."""
    write_bundle(cloud)
    (manifest,) = cloud.offer()
    hashes = {each.sha256 for variant in manifest.variants.values() for each in variant.compiled_artifacts.values()}
    assert hashlib.sha256(PARTS["head.onnx"]).hexdigest() not in hashes
    assert len(list((cloud.folder / "containers").iterdir())) == 4


def test_a_version_names_one_bundle(cloud: Cloud) -> None:
    """The same again costs nothing; another variant's bytes, another figure or one mode less need a new version."""
    write_bundle(cloud)
    first = cloud.offer()
    cloud.start()
    assert cloud.offer() == first
    assert cloud.sealings == 4
    for card, parts in (
        (BUNDLE, {"features.onnx": b"other"}),
        (BUNDLE.replace("0.95", "0.94"), {}),
        (BUNDLE.replace("accuracy = 0.96", "accuracy = 0.97"), {}),
        (BUNDLE.replace("[3, 48, 320]", "[3, 48, 480]"), {}),
        (BUNDLE.replace('files = ["b.onnx", "b.tflite"]', 'files = ["b.onnx"]'), {}),
    ):
        write_bundle(cloud, card, **parts)
        if "b.tflite" not in card:
            (cloud.models / "reader" / "b.tflite").unlink()
        assert cloud.refusal().reason == "version_reused"
    write_bundle(cloud, BUNDLE.replace('"1.0"', '"1.1"'), **{"features.onnx": b"other"})
    assert [each.token for each in cloud.offer()] == [2]
    assert cloud.sealings == 8


def test_a_model_published_without_variants_stays_as_it_is(cloud: Cloud) -> None:
    """A state that an older cloud wrote has no variants in it: the same folder is still the same version."""
    cloud.write(onnx=ONNX)
    first = cloud.offer()
    state = Depot(cloud.folder / "state")
    stored = state.load("published.json") or b""
    book = json.loads(stored)
    for manifest in book["manifests"]["label-reader"].values():
        for later in ("accuracy", "latency_ms", "memory_bytes", "example_shapes", "variants"):
            del manifest[later]
    state.save("published.json", json.dumps(book).encode())
    state.close()
    cloud.start()
    assert cloud.offer() == first
    assert cloud.sealings == 1


MISTAKEN_BUNDLES = {
    "mode A": (BUNDLE.replace("variants.B", "variants.A"), "malformed", "mode A is the model itself"),
    "no head": (BUNDLE.replace('head = "head.onnx"\n', ""), "malformed", "mode D names no head"),
    "head elsewhere": (BUNDLE.replace("[variants.B]\n", '[variants.B]\nhead = "head.onnx"\n'), "malformed", "mode B has a head"),
    "no such mode": (BUNDLE.replace("variants.B", "variants.E"), "malformed", "Invalid enum value 'E'"),
    "path": (BUNDLE.replace('"b.onnx"', '"../b.onnx"'), "malformed", ":14: "),
    "share": (BUNDLE.replace("0.95", "95.0"), "malformed", ":15: "),
    "unknown key": (BUNDLE.replace('how = "blocks"', 'colour = "red"'), "malformed", "unknown field `colour`"),
    "missing file": (BUNDLE.replace('"b.tflite"', '"c.tflite"'), "model", "mode B names c.tflite"),
    "no model file": (BUNDLE.replace('"b.tflite"', '"model.toml"'), "model", "mode B names model.toml"),
    "two of a kind": (BUNDLE.replace('"b.tflite"', '"features.onnx"'), "model", "b.onnx and features.onnx are both for onnxruntime_onnx"),
}


@pytest.mark.parametrize("mistake", MISTAKEN_BUNDLES)
def test_mistakes_in_a_bundle_are_named(cloud: Cloud, mistake: str) -> None:
    """Nothing of it is sealed, and the offer stays."""
    card, reason, what = MISTAKEN_BUNDLES[mistake]
    folder = write_bundle(cloud, card)
    if mistake == "missing file":
        (folder / "b.tflite").unlink()
    error = cloud.refusal()
    assert error.reason == reason
    assert what in str(error)
    assert str(folder) in str(error)
    assert cloud.sealings == 0


def test_a_file_that_no_mode_names_is_not_taken_for_a_model(cloud: Cloud) -> None:
    """Two files for one platform are an error that says how to tell them apart."""
    folder = write_bundle(cloud)
    (folder / "forgotten.onnx").write_bytes(b"x")
    error = cloud.refusal()
    assert "forgotten.onnx and model.onnx" in str(error)
    assert "name it under the variant" in error.remedy
