"""Tables, plots and pages that show the figures of `pipeline.evaluation`."""
