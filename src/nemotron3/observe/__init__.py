"""What a run shows of itself: metrics, sinks, plots and the report."""
