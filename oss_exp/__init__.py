"""Optimal step schedules for few-step diffusion and flow-matching samplers (OSS, arXiv 2503.21774)."""

__version__ = "0.1.0"
