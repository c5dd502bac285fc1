"""Jupyter widgets: a form that starts runs and a monitor that follows them.

The only room that imports ipywidgets. Each widget keeps display state only: what it does is one call of
the API, which its `code()` prints.
"""
