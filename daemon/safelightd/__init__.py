"""Safelight's daemon: what runs on the machine with the GPU. Imports `safelight`, never the reverse."""
