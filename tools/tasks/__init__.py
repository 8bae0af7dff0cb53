"""Two small tasks beside classification: detect digits on a canvas, and find the slots of a sentence of word ids."""
