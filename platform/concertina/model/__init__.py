"""The decoder: attention, router, experts, losses, and the names of Hugging Face's families."""

from concertina.model.decoder import Batch, Decoder, ModelOutput
from concertina.model.parameters import Part
from concertina.model.span import Place

__all__ = ["Batch", "Decoder", "ModelOutput", "Part", "Place"]
