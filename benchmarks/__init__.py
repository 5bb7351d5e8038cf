"""What is measured against what; each module prints ratios."""
