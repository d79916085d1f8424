"""What is measured, not asserted: each script prints a table of ratios against a reference timed in the same run."""
