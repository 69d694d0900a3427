"""What we report: predictions, significance, the report."""
