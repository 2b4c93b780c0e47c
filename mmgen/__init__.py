"""mmgen: native image generation with one transformer over text and image codes."""

__version__ = "0.1.0"
