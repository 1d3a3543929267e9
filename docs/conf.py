"""Sphinx configuration: MyST pages and the furo theme."""

project = "commissure"
author = "The commissure developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
html_theme = "furo"
html_title = "commissure"
exclude_patterns = ["_build"]
