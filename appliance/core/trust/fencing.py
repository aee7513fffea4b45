"""The fence of deployment tokens: a release that is older than one already seen can not come back.

1. A token above the highest one seen for its model is admitted (fencing token; Kleppmann, "How to do distributed locking", 2016).
2. An equal token is admitted only with the same fingerprint: the same release offered again, not another under its number.
3. Anything lower is refused, and nothing changes. Models do not share a fence.
4. The fence is a value: `admit` returns the next one, and the caller stores it *before* it acts on the release.
"""

import hashlib
from collections.abc import Mapping

import msgspec

from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.models import CompiledArtifact, Manifest
from appliance.contract.vocabulary import Platform


class Mark(msgspec.Struct, frozen=True):
    """The highest admitted token of a model, and the fingerprint that came with it."""

    token: int
    fingerprint: str


class Fence(msgspec.Struct, frozen=True):
    """The highest marks by model id."""

    highest: dict[str, Mark] = {}

    def admit(self, model_id: str, token: int, fingerprint: str) -> "Fence":
        """Return the fence with this release as its model's mark. Raises: TheirsError (`stale_token`, `token_reused`)."""
        mark = self.highest.get(model_id)
        if mark is not None and token < mark.token:
            raise TheirsError("stale_token", f"token {token} is older than {mark.token}, which was seen already", where=model_id)
        if mark is not None and token == mark.token and fingerprint != mark.fingerprint:
            raise TheirsError("token_reused", f"token {token} was used for another release ({mark.fingerprint[:16]}…)", where=model_id)
        return Fence({**self.highest, model_id: Mark(token, fingerprint)})

    def pack(self) -> bytes:
        """Return the stored form (JSON, keys sorted)."""
        return msgspec.json.encode(self, order="deterministic")


def unpack(payload: bytes) -> Fence:
    """Read the stored form.

    Raises: WorldError (`fence`): a damaged fence must not be taken for an empty one.
    """
    try:
        return msgspec.json.decode(payload, type=Fence)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WorldError(
            "fence", f"the stored deployment tokens are damaged: {error}", remedy="restore the file, or enrol the device anew"
        ) from error


def fingerprint(manifest: Manifest) -> str:
    """Return SHA-256 (hex) over the fields that make a release what it is.

    They are named here one by one: a later field of the contract must not change the fingerprint of a release that is running.
    """
    artifacts = _rows(manifest.compiled_artifacts)
    limits = manifest.edge_constraints
    fields = [
        manifest.model_id,
        manifest.version,
        manifest.sha256,
        manifest.token,
        artifacts,
        [float(limits.min_vram_gb), limits.max_batch_size, float(limits.target_latency_ms)],
    ]
    if manifest.variants:
        fields.append([[mode, _rows(variant.compiled_artifacts)] for mode, variant in sorted(manifest.variants.items())])
    if (manifest.offline, manifest.at_term) != ("lease", "keep"):  # a release from before these fields keeps its fingerprint
        fields += [manifest.offline, manifest.at_term]
    return hashlib.sha256(msgspec.json.encode(fields)).hexdigest()


def _rows(artifacts: Mapping[Platform, CompiledArtifact]) -> list[list[str | int]]:
    return [
        [platform, each.size, each.sha256, each.container_size, each.container_sha256, each.root]
        for platform, each in sorted(artifacts.items())
    ]
