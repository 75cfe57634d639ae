"""The page of `kvq report`: what is measured for it (facts.py), its pictures (figures.py), its HTML (render.py)."""

from __future__ import annotations

from .facts import PageFacts, gather
from .render import render_page

__all__ = ["PageFacts", "gather", "render_page"]
