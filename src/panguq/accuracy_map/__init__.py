"""The accuracy map: recipes by tasks of one model, in a folder that grows cell by cell."""
