"""Sizes and colours of all figures.

Pages are 8 inches wide and 1600 pixels, made for a web page that shows them 800 pixels wide; curves are as wide as a
column of a paper.
"""

WIDTH, COLUMN, DPI = 8.0, 3.5, 200  # inches, inches, dots per inch
MARGIN = 0.1  # inches: around the page and between columns of blocks
SMALL, NORMAL = 7.5, 8.5  # points
INK, GREY, RULE = "#222222", "#666666", "#cccccc"
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"  # Okabe and Ito 2008: distinct with any colour vision
# Colour, marker and line of the series of one panel, distinct also in grey.
SERIES = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", "-."), ("#cc79a7", "D", ":"), ("#e69f00", "v", "-"),
           ("#56b4e9", "P", "--"), ("#4d4d4d", "X", "-."), (BLUE, "<", ":"), (ORANGE, "*", "-."),
           (GREEN, "d", "--"))  # fmt: skip
