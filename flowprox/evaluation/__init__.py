"""Measuring reconstructions, and showing them: the loop, records, report, demo."""
