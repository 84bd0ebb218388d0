"""Text from a Doge model: `model.generate` with its cache works as with any other; this is the fast way."""

from doge.generation.decoder import Decoder
from doge.generation.sampling import Sampling

__all__ = ["Decoder", "Sampling"]
