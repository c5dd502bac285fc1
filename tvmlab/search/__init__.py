"""Strategies (one a file), the learned cost model, and the allocation of trials to tasks."""
