"""The supervision channel between the members of a run and its coordinator."""

from concertina.elastic.channel.client import BEAT_S, ChannelClient
from concertina.elastic.channel.gaps import Gaps
from concertina.elastic.channel.server import ChannelServer, Silence
from concertina.elastic.channel.wire import Hello

__all__ = ["BEAT_S", "ChannelClient", "ChannelServer", "Gaps", "Hello", "Silence"]
