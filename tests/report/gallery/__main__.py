"""Draws figures of the gallery at every depth: ``FOLDER [NAME ...]``."""

import itertools
import sys
from pathlib import Path

from normfree.report import save_figure

from . import DEPTHS, FIGURES

folder, *names = sys.argv[1:]
for name, n_layer in itertools.product(names or FIGURES, DEPTHS):
    save_figure(FIGURES[name](n_layer), Path(folder), f"{name}-{n_layer:02}")
