"""Fragmented processes are renewed at a calm moment, one at a time, and a failed renewal does not stop the loop."""

from appliance.contract.errors import WorldError
from appliance.core.serve.renewal import SETTLED_BATCHES, Holding
from appliance.edge.renewing import Renewing
from appliance.lab.virtual import VirtualClock, run

MIB = 1 << 20


class Processes:
    """Two workers; the second one holds a third more than it needs."""

    def __init__(self) -> None:
        self.pids = [100, 200]
        self.held = [100 * MIB, 100 * MIB]
        self.calm = True
        self.renewed: list[int] = []
        self.ratios: list[float] = []
        self.error: WorldError | None = None
        self.renewing = Renewing(
            VirtualClock(),
            holdings=lambda: [
                Holding(number, self.pids[number], self.held[number], 98 * MIB, resting=True, batches=SETTLED_BATCHES + 1)
                for number in (0, 1)
            ],
            renew=self.renew,
            calm=lambda: self.calm,
            room_bytes=lambda: 1 << 30,
            fragmented=self.ratios.append,
        )

    async def renew(self, worker: int) -> None:
        self.renewed.append(worker)
        if self.error is not None:
            raise self.error
        self.pids[worker] += 1
        self.held[worker] = 98 * MIB


def test_the_fragmented_one_is_renewed_when_it_is_calm_and_then_left_alone() -> None:
    """Nothing happens before it is calm; then the one that wastes is renewed once, and the gauge falls."""

    async def body() -> None:
        processes = Processes()
        await processes.renewing.look()  # what each holds in its own way of working is learned
        processes.held[1] = 150 * MIB
        processes.calm = False
        await processes.renewing.look()
        assert processes.renewed == []
        processes.calm = True
        for _ in range(3):
            await processes.renewing.look()
        assert processes.renewed == [1]
        assert processes.ratios[-3] > 0.3
        assert processes.ratios[-1] < 0.05

    run(body())


def test_a_renewal_that_fails_is_told_and_not_tried_again_at_once() -> None:
    """No memory for a second process: the old one serves on, and the loop goes on."""

    async def body() -> None:
        processes = Processes()
        await processes.renewing.look()
        processes.held[1] = 150 * MIB
        processes.error = WorldError("memory", "no room")
        for _ in range(5):
            await processes.renewing.look()
        assert processes.renewed == [1]

    run(body())
