"""All requests that this back-end answers, and the rules that hold for each of them.

The order of messages is what peers really take, not what the text implies: only what could harm somebody is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from transports.vhost_user.requests import config_space, device, iotlb, memory, negotiation, net, rings
from transports.vhost_user.requests.operation import Operation, Refuse, RequestType
from transports.vhost_user.state.connection_state import ConnectionState
from transports.vhost_user.wire.framing import Frame, why_unserved
from transports.vhost_user.wire.message import Message
from virtio.errors import PeerError

REQUESTS: Final[Mapping[int, type[RequestType]]] = MappingProxyType(
    {
        request.message.number: request
        for request in (
            negotiation.GetFeatures,
            negotiation.SetFeatures,
            negotiation.SetOwner,
            negotiation.DisableAllQueues,
            negotiation.GetProtocolFeatures,
            negotiation.SetProtocolFeatures,
            negotiation.GetQueueNum,
            memory.SetMemory,
            memory.GetMaxMemorySlots,
            memory.AddRegion,
            memory.RemoveRegion,
            rings.SetRingSize,
            rings.SetRingAddresses,
            rings.SetRingBase,
            rings.StopQueue,
            rings.SetKick,
            rings.SetCall,
            rings.SetErr,
            rings.EnableQueue,
            rings.KickQueue,
            config_space.ReadConfig,
            config_space.WriteConfig,
            device.SetStatus,
            device.GetStatus,
            device.ResetDevice,
            device.SetBackendChannel,
            iotlb.IotlbRequest,
            net.SetMtu,
            net.Announce,
        )
    }
)

MESSAGES: Final[Mapping[int, Message]] = MappingProxyType(
    {number: REQUESTS[number].message for number in sorted(REQUESTS)}
)
"""The row of each, by number."""

_PROTOCOL_FEATURE_NAMES: Final = {bit: name for name, bit in negotiation.PROTOCOL_FEATURES.items()}


def plan(state: ConnectionState, frame: Frame) -> Operation:
    """What a whole message asks for; ``RequestType.plan`` says which errors mean what."""
    row = frame.message
    request = REQUESTS.get(row.number)
    if request is None:
        return Refuse(why_unserved(row))
    if row.feature is not None and not state.offered_protocol_features >> row.feature & 1:
        raise PeerError(f"belongs to {_PROTOCOL_FEATURE_NAMES[row.feature]}, which this device does not offer")
    try:
        return request.plan(state, frame)
    except rings.NoSuchQueueError as error:
        return Refuse(str(error), missing_queue=error.index)
