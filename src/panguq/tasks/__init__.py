"""Tasks that say how good a model is: their data, their protocols, their statistics."""
