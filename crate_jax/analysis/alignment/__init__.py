"""What learning by reconstruction can teach about labels (Balestriero & LeCun, ICML 2024); see docs/alignment.md."""
