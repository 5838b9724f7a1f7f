"""The verbs of the front door."""

from __future__ import annotations


def search(): ...


def sample(): ...


def compare(): ...
