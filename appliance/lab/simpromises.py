"""What must hold at the end of every seed, whatever went wrong before."""

from collections.abc import Iterator

from appliance.contract.errors import ApplianceError
from appliance.contract.inference import Answer
from appliance.contract.vocabulary import LinkState
from appliance.lab.simfaults import Plant
from appliance.lab.simload import Load, answered
from appliance.lab.simplant import Device


def unsettled(plant: Plant, load: Load) -> list[tuple[str, str]]:
    """What does not yet stand as it must when nothing is wrong any more: who, and what."""
    found = [(machine.name, "is not alive") for machine in plant.machines if not machine.alive]
    if found:
        return found
    for device in plant.devices:
        if (state := device.hop.whole) is not LinkState.HEALTHY:
            found.append((device.name, f"the link is {state}"))
        if waiting := [row.item.idem for row in device.disk.rows.values() if not row.reason]:
            found.append((device.name, f"the queue does not drain: {waiting[:3]}"))
    if plant.region.hop.state is not LinkState.HEALTHY:
        found.append((plant.region.name, f"the link is {plant.region.hop.state}"))
    if plant.region.disk.pending:
        found.append((plant.region.name, f"{len(plant.region.disk.pending)} items wait for their effect"))
    found += [(who, "the caller still waits") for who in load.open]
    return found


async def broken(plant: Plant, load: Load) -> list[tuple[str, str]]:
    """Which promises were not kept: who, and what."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for number, sender, idem in load.effects:
        numbers.setdefault((sender, idem), []).append(number)
    found = [(name, f"{idem} took effect {len(some)} times") for (name, idem), some in numbers.items() if len(some) > 1]
    for device in plant.devices:
        mine = {idem: some[0] for (name, idem), some in numbers.items() if name == device.name}
        found += [(device.name, what) for what in _items(device, load, mine)]
        found += [(device.name, what) for what in _order(device, load, mine)]
        found += [(device.name, what) for what in await _kept(device, load)]
    return found


def _items(device: Device, load: Load, numbers: dict[str, int]) -> Iterator[str]:
    """Nothing that was acknowledged is lost; what is dropped is told."""
    disk = device.disk
    for idem in load.accepted[device.name]:
        if idem not in numbers and idem not in disk.gone:
            yield f"{idem} was accepted and is lost"
    for idem in numbers:
        if idem not in load.ordered[device.name]:
            yield f"{idem} took effect and was never put"
    if not device.crashes and (untold := set(disk.gone) - set(device.told)):
        yield f"dropped and not told: {sorted(untold)[:3]}"
    for idem, times in disk.settled.items():
        if times > 1:
            yield f"{idem} was settled {times} times"


def _order(device: Device, load: Load, numbers: dict[str, int]) -> Iterator[str]:
    """Items of one key take effect in the order in which they were put."""
    ordered, seqs = load.ordered[device.name], load.accepted[device.name]
    last: dict[str, tuple[int, str]] = {}
    for seq, idem in sorted((seq, idem) for idem, seq in seqs.items() if seq and idem in numbers and idem not in device.disk.gone):
        key = ordered[idem]
        if key and key in last and last[key][0] > numbers[idem]:
            yield f"{idem} (seq {seq}) of key {key} took effect before {last[key][1]}"
        last[key] = (numbers[idem], idem)


async def _kept(device: Device, load: Load) -> list[str]:
    """A promise is answered, or told to be dropped."""
    found = []
    for promise, wanted in load.promises[device.name].items():
        try:
            got = await device.deferring.fetch(promise)
        except ApplianceError as error:
            if error.reason != "dropped" or promise not in device.disk.gone:
                found.append(f"promise {promise} was not kept: {error.reason}")
        else:
            if not isinstance(got, Answer):
                found.append(f"promise {promise} still waits")
            elif answered(got) != wanted:
                found.append(f"promise {promise} was answered {answered(got)}, expected {wanted}")
    return found
