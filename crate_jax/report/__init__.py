"""What an analysis has to say about one or several runs, and the page that shows it."""

from crate_jax.report.section import Figure, Section, Subject, Table

__all__ = ["Figure", "Section", "Subject", "Table"]
