"""The parts of a report about one or several runs, and the page that shows them."""

from crate_jax.report.section import Figure, Section, Subject, Table

__all__ = ["Figure", "Section", "Subject", "Table"]
