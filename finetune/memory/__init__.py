"""How much memory a run takes: formulas (torch-free), traces of the real model, and what to change so that it fits."""
