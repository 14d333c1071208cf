"""How a session tells its supervisor what happens: events over the far end's channel, stamped with this rank."""

from __future__ import annotations

from threading import Event as Flag

from beringia.processes.channel import Channel
from beringia.records.events import Event


class Reporting:
    """What a session needs of the channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @property
    def go(self) -> Flag:
        """Set when the supervisor lets this chip train and the state is in place."""
        return self._channel.go

    @property
    def stop_requested(self) -> Flag:
        """Set when a checkpoint is to be written and the worker to end."""
        return self._channel.stop_requested

    def event(self, event: Event) -> None:
        """Send an event of this rank."""
        self._channel.line(event.model_copy(update={"rank": self._channel.rank}))

    def beat(self) -> None:
        """Say that the computing thread gets on."""
        self._channel.beat()
