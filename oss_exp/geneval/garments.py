"""The classes of Fashion-MNIST in their order, and the colours of our pictures in RGB."""

from __future__ import annotations

GARMENTS = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
COLOURS = {
    "red": (0.95, 0.15, 0.15),
    "orange": (1.0, 0.55, 0.1),
    "yellow": (1.0, 0.95, 0.2),
    "green": (0.15, 0.8, 0.25),
    "blue": (0.2, 0.35, 1.0),
    "purple": (0.6, 0.2, 0.85),
    "pink": (1.0, 0.55, 0.8),
    "white": (1.0, 1.0, 1.0),
}
