"""Fast text generation with a Doge model; `model.generate` works too, as with any transformers model."""

from doge.generation.decoder import Decoder
from doge.generation.sampling import Sampling

__all__ = ["Decoder", "Sampling"]
