"""Coupled Adam in other people's trainers: a module a trainer, which imports that trainer alone."""
