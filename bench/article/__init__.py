"""Regenerates the article's Figures 3 to 7 from the simulator, and holds each of its numbers against ours."""

from bench.article.book import write_figures

__all__ = ["write_figures"]
