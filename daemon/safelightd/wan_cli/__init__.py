"""Wan's own program as a back end: told what to do, watched by what it says, and gone when its job is."""
