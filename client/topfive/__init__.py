"""topfive: an image in, five labels out. The SDK, and the light kernel that every other part may import."""

from topfive._version import __version__

__all__ = ["__version__"]
