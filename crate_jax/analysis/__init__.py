"""Measures of a trained encoder and the sections that they add to a report; a run comes in, a Section goes out."""
