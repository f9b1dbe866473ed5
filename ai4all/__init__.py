"""The AI4ALL network's native worker: an asyncio control plane over llama.cpp."""

__version__ = "0.1.0"

__all__ = ["__version__"]
