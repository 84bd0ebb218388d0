"""Machines: the Ray Train worker group, who takes which share of a step, progress and recovery."""
