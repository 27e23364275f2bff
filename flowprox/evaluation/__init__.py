"""Measuring reconstructions, and showing them: images, plan, loop, report."""
