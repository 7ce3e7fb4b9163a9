"""Safelight's client: the job as a person sees it. Light on purpose, never imports torch."""

__version__ = "0.1.0"
