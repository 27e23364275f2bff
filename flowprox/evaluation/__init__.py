"""Measuring reconstructions, and showing them: plan, loop, report."""
