"""batchery: batch inference, whole. A server, a client and the engine between them."""

__version__ = "0.1.0"
