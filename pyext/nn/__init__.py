"""Modules built on the ops: position tables and whole attention layers of published models."""
