"""Where in the traces a student has something to learn, measured before it is trained."""
