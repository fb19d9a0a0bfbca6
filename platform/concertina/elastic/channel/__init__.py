"""The supervision channel between the members of a run and its coordinator."""

from concertina.elastic.channel.client import ChannelClient
from concertina.elastic.channel.server import ChannelServer, Silence
from concertina.elastic.channel.wire import Hello

__all__ = ["ChannelClient", "ChannelServer", "Hello", "Silence"]
