"""The site: Sphinx reads the Markdown pages beside this file.

`sphinx-build -W --keep-going -n docs docs/_build` makes it, without the network. A link to a page, a heading or a file that does
not exist is a warning, and -W makes it an error; tests/docs/test_site.py builds it so.
"""

project = "negpool"
author = "The authors of negpool"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "negpool"
html_theme_options = {"sidebar_hide_name": False}
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
myst_heading_anchors = 4  # so that links to `page.md#heading` are checked
highlight_language = "text"  # of blocks that name none
