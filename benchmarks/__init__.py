"""Programs that measure speed and accuracy, ours against others'; each prints its numbers."""
