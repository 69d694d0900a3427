"""The ink: tables, plots and pages of the report."""
